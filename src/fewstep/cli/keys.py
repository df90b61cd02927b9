"""Keys of a command line or a file, for `fewstep stream --keys`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.cli.command import UsageError
from fewstep.streaming.control import keys_of, row_of

if TYPE_CHECKING:
    from fewstep.models.card import Card

NONE = "none"
_HELD = re.compile(r"(?P<keys>[^*\s]+)(?:\*(?P<frames>\d+))?")


def read_keys(text: str, card: Card) -> Tensor:
    """Numbers of keys, `[N, K]`, a row for each frame; the last row stays.

    UsageError for a model that reads no keys, an unknown key, and a file that cannot be read.
    """
    keys = keys_of(card)
    if not keys:
        raise UsageError(
            f"--keys: {card.name!r} reads no keys; train a student with the transform FrameInput (name: keys, words: ...), "
            "such as world/actions"
        )
    path = Path(text)
    held = _file(path, card.fps) if path.suffix == ".txt" else _words(text)
    rows = [_row(names, keys) for names, frames in held for _ in range(frames)]
    return torch.tensor(rows)


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Keys and for how many frames: what comes behind the last one is no key, unless it has no number."""
    parts = text.split()
    for number, part in enumerate(parts, 1):
        found = _HELD.fullmatch(part)
        if found is None or found["frames"] == "0":
            raise UsageError(
                f'--keys: cannot read {part!r}; write keys and numbers of frames, such as "left*8 right*8"'
            )
        yield found["keys"], int(found["frames"] or 1)
        if number == len(parts) and found["frames"]:
            yield NONE, 1


def _file(path: Path, fps: float) -> Iterator[tuple[str, int]]:
    """The same from lines such as `2.5 left`: from this second on, to the nearest frame."""
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"--keys {path}: {error.strerror}") from None
    changes = [(0, NONE)]
    for number, line in enumerate(lines, 1):
        try:
            second, keys = line
            moment = float(second)
        except ValueError:
            raise UsageError(
                f"--keys {path}: line {number} is {' '.join(line)!r}; write its second and keys: 2.5 left"
            ) from None
        if not math.isfinite(moment) or round(moment * fps) < changes[-1][0]:
            raise UsageError(
                f"--keys {path}: line {number} is before the line above it; sort the lines by their seconds"
            )
        changes.append((round(moment * fps), keys))
    for (frame, keys), (end, _) in zip(changes, changes[1:], strict=False):
        yield keys, end - frame
    yield changes[-1][1], 1


def _row(names: str, keys: Sequence[str]) -> list[float]:
    """1 for each key that is held: `left+up`."""
    try:
        return row_of([] if names == NONE else names.split("+"), keys)
    except ValueError as error:
        raise UsageError(f"--keys: {error} and {NONE}") from None
