"""Drift over time: a figure of the frames that rises or falls from the beginning of a video to its end."""

from __future__ import annotations

from torch import Tensor

FEWEST = 4
"""Frames below which a clip has no first and last quarter."""


def drift(series: Tensor, floor: float) -> Tensor:
    """Mean of the last quarter minus mean of the first quarter, over the mean of all, for series `[B, F]`: `[B]`, float64.

    `series` is a figure of every frame, such as its saturation; 0.5 means that it rose by half of its mean. A mean below
    `floor` counts as `floor`, so that nearly nothing does not seem to double. ValueError for fewer than 4 frames.
    """
    if series.ndim != 2 or series.shape[1] < FEWEST:
        raise ValueError(f"drift needs series [B, F >= {FEWEST}], got {list(series.shape)}")
    x = series.double().cpu()
    quarter = x.shape[1] // 4
    return (x[:, -quarter:].mean(1) - x[:, :quarter].mean(1)) / x.mean(1).clamp_min(floor)
