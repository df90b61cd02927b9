"""Files of snapshots: whose they are, and for how long they are kept. The folders say it all, so it outlives the server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

SWEEP = 60.0
"""Seconds between two looks for files whose time is over; and how long a file waits to be given to its holder."""
_NAME = re.compile(r"[A-Za-z0-9_-]+\.safetensors")


@dataclass(frozen=True)
class SnapshotFiles:
    """The worker writes into `folder`; what is kept is in a folder in it for each holder of a key."""

    folder: Path
    kept: float
    """Seconds."""
    most: int
    """Files of one holder; the oldest is deleted for another one."""
    clock: Callable[[], float] = time.time

    def keep(self, name: str, holder: str) -> None:
        """Give a file that the worker has written to a holder."""
        mine = self._of(holder)
        mine.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(mine / name)
        files = sorted(mine.iterdir(), key=_written)
        for file in files[: -self.most]:
            file.unlink(missing_ok=True)

    def path(self, name: str, holder: str) -> str | None:
        """Where a file of the holder is, in the folder; None: there is no such file any more."""
        found = self._of(holder) / name
        if _NAME.fullmatch(name) is None or not found.is_file() or self._old(found, self.kept):
            return None
        return str(found.relative_to(self.folder))

    def sweep(self) -> None:
        """Delete what is too old, and what the worker has written for nobody."""
        for file in self.folder.rglob("*"):
            if file.is_file() and self._old(file, SWEEP if file.parent == self.folder else self.kept):
                file.unlink(missing_ok=True)

    async def sweeping(self) -> None:
        """Without end."""
        while True:
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(min(SWEEP, self.kept))

    def _of(self, holder: str) -> Path:
        return self.folder / f"of-{quote(holder, safe='')}"  # no name leads elsewhere

    def _old(self, file: Path, seconds: float) -> bool:
        return _written(file) + seconds <= self.clock()


def _written(file: Path) -> float:
    """When it was written; 0 for a file that is gone meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
