"""Free disk space, compared with what will be written before work begins."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse (OSError) to begin if the disk of `folder`, which may not exist yet, has less than `needed` bytes free."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    if needed > free:
        said = f"{what}: {_mib(needed)} will be written, and this disk has {_mib(free)} free"
        raise OSError(errno.ENOSPC, said, str(folder))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
