"""Light forms of four measures of VBench (2311.17982), without its large networks.

Three of them reward stillness: a photograph has the best score. So read them only together with `dynamic_degree`, and next
to the same measures of a still picture. They are not VBench's figures, and cannot be compared with its table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

FAST, SIDE = 6.0, 256
"""A pair of frames moves if its fastest 5 % move by more than this many pixels in a video of this shorter side."""
FASTEST = 0.05


def temporal_flickering(frames: Tensor) -> Tensor:
    """`1 - mean |x_{f+1} - x_f|`, pixels in the range [0, 1], of each clip `[B, C, F >= 2, H, W]` in [-1, 1]: `[B]`, float64.

    VBench's formula. VBench uses it for static scenes only, because motion lowers it too.
    """
    _require(frames, 2, "temporal_flickering")
    return 1 - frames.float().diff(dim=2).abs().flatten(1).mean(1).double().cpu() / 2


def motion_smoothness(frames: Tensor) -> Tensor:
    """One minus the mean error of every second frame, predicted as the mean of its neighbours: `[B]`, float64.

    Pixels in the range [0, 1]; clips `[B, C, F >= 3, H, W]` in [-1, 1]. VBench predicts the frame with a network (AMT); a mean
    blurs what moves, so motion lowers this figure more than VBench's.
    """
    _require(frames, 3, "motion_smoothness")
    x = frames.float()
    before, dropped, after = x[:, :, :-2:2], x[:, :, 1:-1:2], x[:, :, 2::2]
    return 1 - (dropped - (before + after) / 2).abs().flatten(1).mean(1).double().cpu() / 2


def dynamic_degree(lengths: Tensor, side: int) -> bool:
    """Whether a video moves, from the shifts `[pairs, rows, columns]` of `flow.block_flow` at about 8 frames per second, in
    pixels of frames whose shorter side has `side` pixels.

    A pair of frames moves if the mean of its largest 5 % of shifts is above 6 pixels per 256 of the shorter side; the video
    moves if `round(4 n / 16)` of its n frames do. VBench's rule, with shifts of blocks in place of a flow network (RAFT).
    """
    flat = lengths.flatten(1)
    top = flat.topk(max(1, round(FASTEST * flat.shape[1])), dim=1).values.mean(1)
    moving = int((top > FAST * side / SIDE).sum())
    return moving >= max(1, round(4 * (len(lengths) + 1) / 16))


def consistency(features: Tensor) -> Tensor:
    """How alike the frames of each video are, from features `[B, F >= 2, D]` of the frames: `[B]` in [0, 1], float64.

    Mean over the frames after the first of `(max(0, cos(f_t, f_1)) + max(0, cos(f_t, f_{t-1}))) / 2`. VBench's background
    consistency has features of CLIP, its subject consistency those of DINO.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"consistency needs features [B, F >= 2, D], got {list(features.shape)}")
    f = normalize(features.double().cpu(), dim=2)
    later = f[:, 1:]
    first, last = (later * f[:, :1]).sum(2).clamp_min(0), (later * f[:, :-1]).sum(2).clamp_min(0)
    return torch.clamp((first + last) / 2, max=1.0).mean(1)


def _require(frames: Tensor, fewest: int, name: str) -> None:
    if frames.ndim != 5 or frames.shape[2] < fewest:
        raise ValueError(f"{name} needs clips [B, C, F >= {fewest}, H, W], got {list(frames.shape)}")
