"""Features without a network, for models that have no feature encoder of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LAGS = (1, 2, 4)
GAIN = 4.0  # changes over time are several times smaller than colours; without this the distance hardly sees them


def pooled(frames: Tensor) -> Tensor:
    """Coarse appearance and motion of clips `[B, 3, F, H, W]` in [-1, 1]: `[B, 72]`, float32.

    For each colour channel and quarter of the frame: the mean over each half of the clip, and four times the mean absolute
    change over 1, 2 and 4 frames and the mean absolute second difference. They are fixed, so anybody can recompute them. They
    are weaker than learnt features, but see time. Pictures, clips of one frame, have the 12 means alone: `[B, 12]`. ValueError
    for 2 frames.
    """
    if frames.ndim == 5 and frames.shape[2] == 1:
        return _cells(frames.float(), 1)
    if frames.ndim != 5 or frames.shape[2] < 3:
        raise ValueError(f"pooled features need clips [B, C, F >= 3, H, W], got {list(frames.shape)}")
    x = frames.float()
    lags = [min(lag, x.shape[2] - 1) for lag in LAGS]
    changes = [x[:, :, lag:] - x[:, :, :-lag] for lag in lags] + [x.diff(n=2, dim=2)]
    moved = [GAIN * _cells(change.abs(), 1) for change in changes]
    return torch.cat([_cells(x, 2), *moved], 1)


def _cells(x: Tensor, spans: int) -> Tensor:
    """Means over `spans` parts of the clip and the four quarters of the frame, as one vector per clip."""
    return functional.adaptive_avg_pool3d(x, (spans, 2, 2)).flatten(1)
