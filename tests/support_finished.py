"""Folders of small finished videos: a reference, and copies of it with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.video import to_pixels, write_video

Change = Callable[[Tensor], Tensor]
FRAMES, SIDE = 12, 32


def film(seed: int, frames: int = FRAMES, side: int = SIDE) -> Tensor:
    """Coloured blocks that move right by two pixels per frame, `[3, F, side, side]` in [-0.6, 0.6]."""
    blocks = 1.2 * torch.rand(3, side // 4, 60, generator=torch.Generator().manual_seed(seed)) - 0.6
    wide = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return torch.stack([wide[:, :, 160 - 2 * f : 160 - 2 * f + side] for f in range(frames)], 1)


def films(
    folder: Path, change: Change = lambda clip: clip, *, count: int = 3, fps: float = 8, side: int = SIDE
) -> Path:
    """Write the first `count` films, changed, as `film-1.mp4` and so on."""
    for number in range(count):
        write_video(folder / f"film-{number + 1}.mp4", change(film(number, side=side)), fps=fps)
    return folder


def pictures(folder: Path, change: Change = lambda clip: clip, *, count: int = 3) -> Path:
    """Write the first frames as pictures."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = to_pixels(change(film(number, 1)))[0]
        Image.fromarray(pixels.numpy()).save(folder / f"film-{number + 1}.png")
    return folder


def vivid(clip: Tensor) -> Tensor:
    """Twice the chroma, at half the contrast, so that nothing is cut off."""
    grey = clip.mean(0, keepdim=True)
    return (grey + 2 * (clip - grey)) / 2


def stopped(clip: Tensor) -> Tensor:
    """The first frame, all the time."""
    return clip[:, :1].expand_as(clip)
