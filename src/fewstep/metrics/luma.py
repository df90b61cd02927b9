"""Brightness of pixels, as video standards weigh the colours."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = (0.299, 0.587, 0.114)
"""Red, green and blue in Rec. 601 luma."""


def luma(frames: Tensor) -> Tensor:
    """Rec. 601 luma of clips `[B, 3, F, H, W]`: `[B, F, H, W]` in the clips' own range, float32."""
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ValueError(f"luma needs clips [B, 3, F, H, W], got {list(frames.shape)}")
    return torch.einsum("bcfhw,c->bfhw", frames.float(), torch.tensor(WEIGHTS, device=frames.device))
