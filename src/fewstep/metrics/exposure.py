"""Exposure: how bright a clip is, and how much of it is lost at both ends of the range."""

from __future__ import annotations

from torch import Tensor

from fewstep.metrics.luma import luma

LOST = 2 / 255
"""Distance from black or white, in the range [0, 1], within which a pixel has no detail left."""
DARK, ALMOST_ALL = 0.10, 0.98
"""A frame is black if this share of its pixels is darker than `DARK`: the defaults of ffmpeg's blackdetect."""


def brightness(frames: Tensor) -> Tensor:
    """Mean luma of each clip `[B, 3, F, H, W]` in [-1, 1]: `[B]` from 0 (black) to 1 (white), float64."""
    return ((luma(frames) + 1) / 2).flatten(1).mean(1).double().cpu()


def clipped(frames: Tensor) -> Tensor:
    """Share of the pixels of each clip `[B, 3, F, H, W]` whose luma is within 2/255 of black or white: `[B]`, float64."""
    y = (luma(frames) + 1) / 2
    return ((y <= LOST) | (y >= 1 - LOST)).flatten(1).double().mean(1).cpu()


def black(frames: Tensor) -> Tensor:
    """Share of black frames in each clip `[B, 3, F, H, W]` in [-1, 1]: `[B]`, float64."""
    dark = ((luma(frames) + 1) / 2 < DARK).flatten(2).double().mean(2)
    return (dark >= ALMOST_ALL).double().mean(1).cpu()
