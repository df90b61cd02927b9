"""Single frames of clips, for methods that look at images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core import Cond, Rng


class Stills(NamedTuple):
    """Single frames of clips."""

    clips: Tensor
    """As clips of one frame, `[N, C, 1, H, W]`."""
    rows: Tensor
    """The clip that each is of, `[N]`."""
    frames: Tensor
    """Its number in that clip, `[N]`."""

    def of(self, cond: Cond) -> Cond:
        """The conditions of these frames: those of their clips, and of what is told frame by frame their own."""
        return cond[self.rows].at(self.frames)


def fold_frames(clips: Tensor, count: int, rng: Rng) -> Stills:
    """`count` different random frames of each clip `[B, C, F, H, W]`, `B count` in all."""
    batch, _, frames = clips.shape[:3]
    count = min(count, frames)
    chosen = rng.rand((batch, frames), "frames").argsort(1)[:, :count].reshape(-1)
    rows = torch.arange(batch, device=clips.device).repeat_interleave(count)
    return Stills(clips[rows, :, chosen].unsqueeze(2), rows, chosen)
