"""Reads long clips window by window: what is right against the script, since when, and whether it is still the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.world.checker import ABSTAIN, Checker, Readings, indices, wrap
from fewstep.world.grammar import ATTRIBUTES
from fewstep.world.scripts import Script

LENGTH = 16
"""Frames of a window: those of the built-in models' clips."""
IDENTITY = tuple(list(ATTRIBUTES).index(name) for name in ("shape", "colour", "size"))
"""Attributes that make the object what it is."""
NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Readings of W windows of B clips."""

    first: tuple[int, ...]
    """First frame of each window."""
    length: int
    values: Tensor
    """int64 `[B, W, 6]`: index within each of `ATTRIBUTES`, or -1 where the checker abstained."""
    unbroken: Tensor
    """bool `[B, W]`: the object is visible in every frame from the window before, and never jumps."""

    def same_object(self, *, since: int = 0) -> Tensor:
        """bool `[B, W]`: shape, colour and size are those read in window `since`, and the track is unbroken since then.

        Windows before `since` are not the same. An unclear window is not, and after a break no later one is.
        """
        looks = self.values[:, :, IDENTITY]
        same = ((looks == looks[:, since : since + 1]) & (looks != ABSTAIN)).all(2)
        unbroken = self.unbroken.clone()
        unbroken[:, : since + 1] = True
        same = same & unbroken.cummin(1).values
        same[:, :since] = False
        return same

    def right(self, scripts: Sequence[Script]) -> Tensor:
        """float64 `[B, W, 6]`: 1 where the attribute is that of the window's scene, else 0; NaN where the scene changes within
        the window. ValueError unless there is one script per clip."""
        if len(scripts) != len(self.values):
            raise ValueError(f"{len(self.values)} clips but {len(scripts)} scripts; give one script per clip")
        found = torch.full(self.values.shape, torch.nan, dtype=torch.float64)
        for i, script in enumerate(scripts):
            for w, first in enumerate(self.first):
                scene = script.during(first, first + self.length)
                if scene is not None:
                    found[i, w] = (self.values[i, w].cpu() == indices([scene])[0]).double()
        return found

    def since(self, right: Tensor, frame: int = 0) -> Tensor:
        """int64 `[B]`: first frame, from `frame` on, of the first window from which all later ones are right; -1 for never.

        `right` is `[B, W]`, not 0 where a window is right; windows that begin before `frame` do not count.
        """
        later = torch.tensor([first >= frame for first in self.first])
        stays = (right.cpu() != 0).flip(1).cummin(1).values.flip(1) & later
        begin = torch.tensor(self.first)[stays.int().argmax(1)]
        return torch.where(stays.any(1), begin, NEVER)


def read_windows(
    clips: Tensor, length: int = LENGTH, stride: int | None = None, checker: Checker | None = None
) -> Windows:
    """Read windows of `length` frames of clips `[B, 3, F, 32, 32]`, one every `stride` frames (default: no overlap).

    Frames after the last whole window are not read. ValueError for clips shorter than a window, and for gaps between windows.
    """
    checker, stride = checker or Checker(), stride or length
    if not 1 <= length <= clips.shape[2] or not 1 <= stride <= length:
        raise ValueError(
            f"windows of {length} frames, one every {stride}, cannot be read from clips of {clips.shape[2]} frames; give "
            "1 <= stride <= length <= frames"
        )
    starts = range(0, clips.shape[2] - length + 1, stride)
    return joined([checker.read(clips[:, :, first : first + length]) for first in starts], stride, checker)


def joined(readings: Sequence[Readings], stride: int, checker: Checker | None = None) -> Windows:
    """Windows of readings that were made one after the other, each `stride` frames after the one before.

    So a clip of any length is read in parts, and its frames need not be kept.
    """
    checker, length = checker or Checker(), readings[0].track.shape[1]
    reach = checker.speed_range[1] + 2 * checker.track_jitter
    unbroken = []
    for i, found in enumerate(readings):
        adjoins = i > 0 and stride == length  # windows that overlap share a frame, so their own frames tell
        track = torch.cat([readings[i - 1].track[:, -1:], found.track], 1) if adjoins else found.track
        jumps = wrap(track.diff(dim=1)).norm(dim=2)
        unbroken.append(~track.isnan().any(2).any(1) & (jumps <= reach).all(1))
    return Windows(
        first=tuple(stride * i for i in range(len(readings))),
        length=length,
        values=torch.stack([found.values for found in readings], 1),
        unbroken=torch.stack(unbroken, 1),
    )
