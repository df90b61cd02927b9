"""Frozen frames: a video that stands still, or repeats a frame to fill a gap."""

from __future__ import annotations

from torch import Tensor

STILL = 0.001
"""Mean change of the pixels, in the range [0, 1], below which two frames count as one: the default of ffmpeg's
freezedetect."""


def frozen(frames: Tensor) -> Tensor:
    """Share of neighbouring frames that are the same picture, in each clip `[B, C, F, H, W]` in [-1, 1]: `[B]`, float64.

    Two frames are the same if their pixels differ by less than 0.001 of the range in the mean. ValueError for fewer than 2
    frames.
    """
    if frames.ndim != 5 or frames.shape[2] < 2:
        raise ValueError(f"frozen needs clips [B, C, F >= 2, H, W], got {list(frames.shape)}")
    change = frames.float().diff(dim=2).abs().mean((1, 3, 4)) / 2
    return (change < STILL).double().mean(1).cpu()
