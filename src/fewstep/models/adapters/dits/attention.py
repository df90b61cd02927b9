"""Attention layers of diffusers that normalise queries and keys over all heads together, as in Wan and LTX.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.attention import Operation
from fewstep.core import KV
from fewstep.models.backbone import Tokens, read
from fewstep.models.video_dit import merge_heads, split_heads


def project(attention: Any, x_BNE: Tensor, source_BME: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of the source, by heads; the norms are computed in full precision."""
    q, k, v = attention.to_q(x_BNE), attention.to_k(source_BME), attention.to_v(source_BME)
    with torch.autocast(x_BNE.device.type, enabled=False):
        q, k = (norm(y.to(x_BNE.dtype)).to(v.dtype) for norm, y in ((attention.norm_q, q), (attention.norm_k, k)))
    return split_heads(q, attention.heads), split_heads(k, attention.heads), split_heads(v, attention.heads)


def out(attention: Any, mixed_BHND: Tensor) -> Tensor:
    """What the layer makes of the values that its queries read."""
    linear: Tensor = attention.to_out[0](merge_heads(mixed_BHND))
    return linear


def read_frames(attention: Any, h_BNE: Tensor, state: Tokens, operation: Operation) -> tuple[Tensor, KV]:
    """What tokens read from each other and from earlier frames, and their own keys and values for later ones."""
    mixed, new = read(operation, project(attention, h_BNE, h_BNE), state.context, state.past)
    return out(attention, mixed), new
