"""Floats that networks make and read: as bytes, and at another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def to_uint8(values: Tensor) -> Tensor:
    """Convert floats in [-1, 1] of any shape to uint8 0..255, where they are. Values outside are clipped."""
    return ((values.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def cover(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Floats `[N, C, H, W]` scaled to cover `size`, bicubic and antialiased, and cropped at the centre.

    One side then fits exactly. Bicubic interpolation overshoots at edges: values may leave the range of the input.
    """
    (height, width), (target_h, target_w) = planes.shape[-2:], size
    ratio = max(target_h / height, target_w / width)
    covered = max(target_h, round(height * ratio)), max(target_w, round(width * ratio))
    planes = interpolate(planes, covered, mode="bicubic", antialias=True, align_corners=False)
    top, left = (covered[0] - target_h) // 2, (covered[1] - target_w) // 2
    return planes[..., top : top + target_h, left : left + target_w]


def covering(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Clips `[B, 3, F, H, W]` in [-1, 1] scaled to cover `size` and cropped at the centre (`cover`), within [-1, 1] again.

    Clips that fit are not changed.
    """
    if frames.shape[-2:] == size:
        return frames
    planes = cover(frames.transpose(1, 2).flatten(0, 1).float(), size).clamp(-1, 1)
    return planes.unflatten(0, (len(frames), -1)).transpose(1, 2)
