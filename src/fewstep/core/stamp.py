"""Length and digest of a file, to detect damage or exchange."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fewstep.core.env import cpu_count

BLOCK = 1 << 24
PIECE = 1 << 18
"""Bytes in memory at once."""


def stamp_of(path: Path) -> str:
    """`<length> <digest>`: the SHA-256 of the SHA-256 of every block, which all cores read and hash side by side."""
    size = path.stat().st_size
    starts = range(0, size, BLOCK)
    if len(starts) < 2:
        digests = [_digest(path, start) for start in starts]
    else:
        with ThreadPoolExecutor(min(cpu_count(), len(starts)), "stamp") as pool:
            digests = list(pool.map(lambda start: _digest(path, start), starts))
    return f"{size} {hashlib.sha256(b''.join(digests)).hexdigest()[:32]}"


def _digest(path: Path, start: int) -> bytes:
    found, left = hashlib.sha256(), BLOCK
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(min(PIECE, left)):
            found.update(piece)
            left -= len(piece)
    return found.digest()
