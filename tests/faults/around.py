"""What holds while a command runs: a disk that is full, a folder that another command works in, too little memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

Around = Callable[[], AbstractContextManager[Any]]


def failing(code: int) -> Around:
    """Every file that is written fails at its end, with this error of the system."""

    def settle(file: Path) -> None:
        raise OSError(code, os.strerror(code), str(file))

    return lambda: patch("fewstep.core.atomic.settle", settle)


full_disk, read_only, quota = failing(errno.ENOSPC), failing(errno.EROFS), failing(errno.EDQUOT)


def into_full(name: str) -> Around:
    """What is written to the file `name` goes to /dev/full."""

    @contextmanager
    def around() -> Iterator[None]:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    return around


def held(folder: str) -> Around:
    """Another command works in `folder`."""

    def around() -> AbstractContextManager[None]:
        from fewstep.core.lock import holding

        return holding(Path(folder))

    return around


def raising(where: str, error: BaseException) -> Around:
    """Whatever calls `where` gets an error."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return lambda: patch(where, fail)
