"""Animated GIFs, which every browser and mail program can show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from fewstep.core.pixels import to_uint8
from fewstep.data.video import encode_gif

GAP = 6
"""Pixels between the clips of a grid."""
INK, PAPER = (40, 44, 52), (255, 255, 255)


def gif_bytes(frames: Tensor, fps: float = 8.0, scale: int = 1) -> bytes:
    """One clip `[3, F, H, W]`, uint8 or in [-1, 1], as an endless GIF, each pixel `scale` pixels wide, at most 256 colours."""
    return encode_gif(enlarge(_uint8(frames), scale).permute(1, 2, 3, 0).contiguous().cpu().numpy(), fps)


def grid_gif(path: Path | str, columns: Mapping[str, Tensor], *, fps: float = 8.0, scale: int = 4) -> Path:
    """Write clips side by side: one column `[P, 3, F, H, W]` per name, one line per prompt, names on top.

    ValueError if the columns have different shapes.
    """
    shapes = {name: tuple(clips.shape) for name, clips in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"all columns must have the same shape, got {shapes}")
    clips = [enlarge(_uint8(column), scale) for column in columns.values()]
    lines = [torch.cat([_padded(column[p]) for column in clips], dim=3) for p in range(len(clips[0]))]
    pixels = torch.cat(lines, dim=2).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    head, step = 12 + GAP, pixels.shape[2] // len(clips)
    images = []
    for frame in pixels:
        image = Image.new("RGB", (frame.shape[1], frame.shape[0] + head), PAPER)
        image.paste(Image.fromarray(frame), (0, head))
        draw = ImageDraw.Draw(image)
        for i, name in enumerate(columns):
            draw.text((i * step + GAP, 4), name, fill=INK, font=ImageFont.load_default())
        images.append(image)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_gif(np.stack([np.asarray(image) for image in images]), fps))
    return path


def enlarge(clips: Tensor, scale: int) -> Tensor:
    """Every pixel of `[..., H, W]` as a `scale x scale` block."""
    return clips.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def fitted(clips: Tensor, side: int) -> Tensor:
    """Clips `[B, 3, F, H, W]`, uint8, scaled down if a side is longer than `side` pixels."""
    height, width = clips.shape[-2:]
    if max(height, width) <= side:
        return clips
    size = tuple(max(1, round(n * side / max(height, width))) for n in (height, width))
    flat = clips.transpose(1, 2).flatten(0, 1).float()
    small = functional.interpolate(flat, size, mode="area").round().to(torch.uint8)
    return small.unflatten(0, (len(clips), -1)).transpose(1, 2)


def _uint8(frames: Tensor) -> Tensor:
    return frames if frames.dtype == torch.uint8 else to_uint8(frames)


def _padded(clip: Tensor) -> Tensor:
    """One clip `[3, F, H, W]` with a white margin."""
    return functional.pad(clip, (GAP // 2, GAP // 2, GAP // 2, GAP // 2), value=255)
