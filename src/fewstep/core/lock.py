"""A lock that allows one program at a time in a folder, so that two never write the same files."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".running"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
log = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another program works in a folder."""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep other programs out of `folder`, which is made if it is not there. FolderInUse where one works in it.

    The lock ends with its process, however that ends. On a network file system it holds between machines too where the file
    system has locks (NFS 4, Lustre with `flock`); where it has none, a warning says so. An OSError in this block that names
    no file (a disk that is full says only that) names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    file = _locked(path)
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
        raise
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: nobody then holds a file that has no name
        os.close(file)


def _locked(path: Path) -> int:
    """The lock's file, open and locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, path)
            if (
                path.exists() and path.stat().st_ino == os.fstat(file).st_ino
            ):  # else its last holder has just deleted it
                who = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M}"
                os.truncate(file, 0)
                os.write(file, who.encode())
                return file
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(file, 200).decode(errors="replace") or "a process that has just begun"
        raise FolderInUse(
            f"{path.parent} is in use by another fewstep ({who}). Wait until it ends, stop it, or give another output folder."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s is on a file system without locks: see to it that no second command writes there", path.parent)
