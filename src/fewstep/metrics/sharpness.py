"""Sharpness: how much fine detail the frames have, whatever their contrast."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.luma import luma

FLAT = 2 / 255
"""Standard deviation of the luma, one grey level of 8 bits, below which a frame has nothing that could be sharp."""


def sharpness(frames: Tensor) -> Tensor:
    """Root mean square of the luma's Laplacian over its standard deviation, mean over the frames of each clip
    `[B, 3, F, H, W]` in [-1, 1]: `[B]`, float64.

    The Laplacian is `4 y - up - down - left - right`, inside the frame (Pech-Pacheco et al. 2000 take its variance). Divided
    by the standard deviation, the figure does not change with contrast and brightness. Blur lowers it; noise raises it. It
    depends on the number of pixels, so compare clips of one size. A flat frame counts as 0. ValueError below 3 x 3 pixels.
    """
    if frames.ndim != 5 or min(frames.shape[-2:]) < 3:
        raise ValueError(f"sharpness needs clips [B, 3, F, H >= 3, W >= 3], got {list(frames.shape)}")
    y = luma(frames).double()
    centre, rest = y[..., 1:-1, 1:-1], y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    fine = (4 * centre - rest).flatten(2).square().mean(2).sqrt()
    spread = y.flatten(2).std(2, correction=0)
    return torch.where(spread > FLAT, fine / spread.clamp_min(FLAT), 0.0).mean(1).cpu()
