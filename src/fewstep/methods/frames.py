"""Single frames of clips, for methods that look at images."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core import Rng


def fold_frames(clips: Tensor, count: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """`count` different random frames of each clip `[B, C, F, H, W]`, as clips of one frame `[B count, C, 1, H, W]`.

    Also returns the index of each frame's clip, `[B count]`.
    """
    batch, _, frames = clips.shape[:3]
    count = min(count, frames)
    chosen = rng.rand((batch, frames), "frames").argsort(1)[:, :count].reshape(-1)
    rows = torch.arange(batch, device=clips.device).repeat_interleave(count)
    return clips[rows, :, chosen].unsqueeze(2), rows
