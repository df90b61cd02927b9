"""Temporal flicker: changes from frame to frame that are not steady motion."""

from __future__ import annotations

from torch import Tensor


def flicker(frames: Tensor) -> Tensor:
    """Mean absolute second difference `mean |x_{f+1} - 2 x_f + x_{f-1}|` of each clip `[B, C, F, H, W]`: `[B]`,
    float64.

    The second difference is a high-pass filter in time (gain 4 at the highest frequency, 0 for still or linearly changing
    pixels). Units: pixel range per frame squared; 2 is black to white. A moving edge has flicker too, so compare with the
    teacher on the same prompts and seeds. ValueError for fewer than 3 frames.
    """
    if frames.ndim != 5 or frames.shape[2] < 3:
        raise ValueError(f"flicker needs clips [B, C, F >= 3, H, W], got {list(frames.shape)}")
    return frames.float().diff(n=2, dim=2).abs().flatten(1).mean(1).double().cpu()
