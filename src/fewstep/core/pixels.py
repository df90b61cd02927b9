"""Floats that networks make, as bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(values: Tensor) -> Tensor:
    """Convert floats in [-1, 1] of any shape to uint8 0..255, where they are. Values outside are clipped."""
    return ((values.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
