"""What is told of the frames of a stream besides its prompt: keys, a beat, the place of a camera.

People hold keys and hear sound for frames that are seen; a network reads numbers for latent frames. A latent frame is told the
mean of the frames that it is decoded to: of four frames with `left` held in three, 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_latents(numbers_BNK: Tensor, ends: Sequence[int]) -> Tensor:
    """The numbers of latent frames, `[B, F, K]`, from those of the frames that are seen, `[B, N, K]`.

    `ends[i]` is how many frames `i` latent frames are decoded to (`VideoModel.clip_frames`), from `ends[0]`, the number of
    the first frame. ValueError where the numbers end before the clip.
    """
    if numbers_BNK.ndim != 3 or numbers_BNK.shape[1] < ends[-1] - ends[0]:
        raise ValueError(
            f"{ends[-1] - ends[0]} frames need as many numbers, [B, N, K], one row for each frame; got {list(numbers_BNK.shape)}"
        )
    parts = [numbers_BNK[:, a - ends[0] : b - ends[0]].mean(1) for a, b in zip(ends, ends[1:])]
    return torch.stack(parts, 1)
