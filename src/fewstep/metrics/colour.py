"""Saturation and contrast: strong guidance and a lagging critic raise them long before clips look broken."""

from __future__ import annotations

from torch import Tensor

from fewstep.metrics.luma import luma


def saturation(frames: Tensor) -> Tensor:
    """Mean chroma `max(r, g, b) - min(r, g, b)` of each clip `[B, 3, F, H, W]` in [-1, 1]: `[B]` in [0, 1], float64."""
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ValueError(f"saturation needs clips [B, 3, F, H, W], got {list(frames.shape)}")
    chroma = frames.float().amax(1) - frames.float().amin(1)
    return (chroma / 2).flatten(1).mean(1).double().cpu()


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of brightness within a frame, mean over the frames of each clip `[B, 3, F, H, W]`: `[B]`, float64.

    Brightness is Rec. 601 luma of pixels in [-1, 1].
    """
    return luma(frames).flatten(2).std(2).mean(1).double().cpu()
