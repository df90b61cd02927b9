"""Clips of Wan 2.2 TI2V whose first frame is known: it enters clean, and comes out as it was.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.backbone import Tokens


@dataclass(frozen=True)
class Begun(Tokens):
    """The state of a clip whose first frame may be known."""

    known_BC1HW: Tensor | None = None
    """Flow at that frame."""


def begun(x: Tensor, t: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latents with the image as their first frame, times `[B, F]` at which it is clean, and the flow from it to `x`."""
    first = image.to(x)
    time_BF = t if t.ndim == 2 else t[:, None].expand(-1, x.shape[2])
    until = time_BF[:, :1].clamp_min(torch.finfo(t.dtype).eps).to(x.dtype)
    flow = (x[:, :, :1] - first) / until[:, None, :, None, None]
    return torch.cat([first, x[:, :, 1:]], 2), torch.cat([0 * time_BF[:, :1], time_BF[:, 1:]], 1), flow


def ended(made: Tensor, known: Tensor | None) -> Tensor:
    """The network's output, with what is known in place of its first frame."""
    return made if known is None else torch.cat([known.to(made.dtype), made[:, :, 1:]], 2)
