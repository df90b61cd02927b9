"""Files and folders that are either complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

UMASK = os.umask(0o022)
"""Permissions that new files do not get. It can be read only by setting it, so this is done once, before threads start."""
os.umask(UMASK)
NAME_BYTES = 255
"""Largest length of a file name on the usual file systems."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of the same suffix; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_file(path)
    try:
        yield draft
        settle(draft)
        draft.replace(path)
    except OSError as error:
        if error.filename == str(draft):  # the user does not know this name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty sibling of `target` that takes its place when the block ends without an error.

    If a kill comes between the two renames, the old folder is kept under another name; `recover(target)` puts it back.
    """
    draft = draft_of(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for path in filter(Path.is_file, draft.rglob("*")):
        settle(path)
    if target.exists():
        discard(target, successor=draft)
    else:
        draft.rename(target)


def new_folder(target: Path) -> AbstractContextManager[Path]:
    """`replacing_folder` for a folder that nobody has filled yet. FileExistsError for one that is not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; give another folder, or delete it")
    return replacing_folder(target)


def settle(file: Path) -> None:
    """Flush a file to the disk, and give it the permissions of any new file."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())  # otherwise a power cut may leave the final name with old or no content
    if stat.S_ISREG(file.lstat().st_mode):
        file.chmod(0o666 & ~UMASK)


def _draft_file(path: Path) -> Path:
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    if len(os.fsencode(draft.name)) <= NAME_BYTES:
        return draft
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.draft{path.suffix}")


def require_writable(path: Path) -> None:
    """Check, before work begins, that the file `path` can be written; OSError if not. Its folder is created."""
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        draft = _draft_file(path)
        try:
            draft.write_bytes(bytes(4096))
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def draft_of(target: Path) -> Path:
    """Where `replacing_folder(target)` writes."""
    return target.with_name(f".draft-{target.name}")


def discard(folder: Path, successor: Path | None = None) -> None:
    """Delete a folder, and optionally give its name to `successor`. After a kill, no incomplete folder has that name."""
    doomed = _doomed(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    if successor is not None:
        successor.rename(folder)
    shutil.rmtree(doomed)


def recover(folder: Path) -> None:
    """Restore the old folder if a kill came between the two renames of `replacing_folder`; otherwise do nothing.

    Use it only for folders that are replaced and never discarded alone: only then is the folder under the other name complete.
    """
    if not folder.exists() and _doomed(folder).is_dir():
        _doomed(folder).rename(folder)


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".discarded-{folder.name}")
