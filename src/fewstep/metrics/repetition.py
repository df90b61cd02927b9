"""Repetition: a video that shows the same thing again, as a loop does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fewstep.metrics.luma import luma

FEWEST = 8
"""Frames below which nothing can be shown twice."""
CELLS = 16
NOTHING = 1e-6
"""Variance of the coarse frames, in squared luma of [-1, 1], below which nothing happens that could be repeated."""


def coarse(frames: Tensor) -> Tensor:
    """Luma of each frame as means over 16 x 16 cells: clips `[B, 3, F, H, W]` to features `[B, F, 256]`."""
    return adaptive_avg_pool2d(luma(frames), (CELLS, CELLS)).flatten(2)


def repetition(features: Tensor) -> Tensor:
    """Largest autocorrelation of features `[B, F, D]` of the frames, at lags after it first falls below 0: `[B]` in [0, 1].

    The features are taken minus their mean over time. Near lag 0, every video resembles itself; so lags count only after the
    autocorrelation has once been negative, and up to F/2, so that something must be there twice. A loop has 1, and a video
    that never comes back has 0, as has a still one. float64. ValueError for fewer than 8 frames.
    """
    if features.ndim != 3 or features.shape[1] < FEWEST:
        raise ValueError(f"repetition needs features [B, F >= {FEWEST}, D], got {list(features.shape)}")
    x = features.double().cpu()
    x = x - x.mean(1, keepdim=True)
    return torch.stack([_returns(clip) for clip in x])


def _returns(x_FD: Tensor) -> Tensor:
    zero, left = x_FD.new_zeros(()), False
    best = zero
    if float(x_FD.square().mean()) < NOTHING:
        return zero
    for lag in range(1, len(x_FD) // 2 + 1):
        before, after = x_FD[:-lag], x_FD[lag:]
        power = (before.square().sum() * after.square().sum()).sqrt()
        likeness = (before * after).sum() / power.clamp_min(NOTHING)
        left = left or bool(likeness < 0)
        if left:
            best = torch.maximum(best, likeness)
    return best.clamp(0, 1)
