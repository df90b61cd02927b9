"""How far the picture moves from one frame to the next, by comparing blocks; no network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

SIDE = 128
"""Shorter side, in pixels, to which frames are scaled down before blocks are compared."""
BLOCK = 8
REACH = 8
"""Largest shift that is tried, in scaled pixels, along each axis."""
BETTER = 0.02
"""By how much (mean luma, range 2) a shifted block must fit better than the block at rest to count as moved."""


def block_flow(before: Tensor, after: Tensor, reach: int = REACH) -> Tensor:
    """Length of the shift of every block of 8 x 8 pixels from luma `before` to `after`, both `[N, H, W]` in [-1, 1]:
    `[N, rows, columns]` in pixels.

    The shift has the smallest mean absolute difference among all whole shifts up to `reach`. A block that fits hardly worse
    without a shift counts as still, so that flat areas and noise of compression do not move. ValueError for frames of less
    than one block.
    """
    if before.shape != after.shape or before.ndim != 3 or min(before.shape[1:]) < BLOCK:
        raise ValueError(
            f"block_flow needs two stacks [N, H >= {BLOCK}, W >= {BLOCK}], got {list(before.shape)} and {list(after.shape)}"
        )
    height, width = (size // BLOCK * BLOCK for size in before.shape[1:])
    before, after = before[:, :height, :width].float(), after[:, :height, :width].float()
    wide = pad(after[:, None], (reach,) * 4, mode="replicate")[:, 0]
    still = _misfit(before, after) - BETTER
    best, length = still, torch.zeros_like(still)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            moved = wide[:, reach + down : reach + down + height, reach + right : reach + right + width]
            misfit = _misfit(before, moved)
            closer = misfit < best
            best = torch.where(closer, misfit, best)
            length = torch.where(closer, (down**2 + right**2) ** 0.5, length)
    return length


def scaled_down(y: Tensor, side: int = SIDE) -> Tensor:
    """Luma `[N, H, W]`, scaled down so that the shorter side has at most `side` pixels."""
    shorter = min(y.shape[1:])
    if shorter <= side:
        return y
    size = [max(1, round(n * side / shorter)) for n in y.shape[1:]]
    return interpolate(y[:, None], size, mode="area")[:, 0]


def _misfit(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of every block."""
    return avg_pool2d((a - b).abs()[:, None], BLOCK)[:, 0]
