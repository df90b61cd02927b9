"""Attention layers of diffusers that normalise queries and keys over all heads together, as Wan's and LTX's do.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.core.types import KV
from fewstep.models.backbone import Tokens
from fewstep.models.video_dit import merge_heads, split_heads


def project(attention: Any, x_BNE: Tensor, source_BME: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of the source, by heads; the norms are computed in full precision."""
    q, k, v = attention.to_q(x_BNE), attention.to_k(source_BME), attention.to_v(source_BME)
    with torch.autocast(x_BNE.device.type, enabled=False):
        q, k = (norm(y.to(x_BNE.dtype)).to(v.dtype) for norm, y in ((attention.norm_q, q), (attention.norm_k, k)))
    return split_heads(q, attention.heads), split_heads(k, attention.heads), split_heads(v, attention.heads)


def after(past: KV | None, new: KV) -> KV:
    """Keys and values of earlier frames, followed by the new ones."""
    return new if past is None else (torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2))


def out(attention: Any, mixed_BHND: Tensor) -> Tensor:
    """What the layer makes of the values that its queries read."""
    linear: Tensor = attention.to_out[0](merge_heads(mixed_BHND))
    return linear


def read_frames(attention: Any, h_BNE: Tensor, state: Tokens, rotary_2ND: Tensor) -> tuple[Tensor, KV]:
    """What tokens read from each other and from earlier frames, and their own keys and values for later ones.

    The table is of all tokens, the earlier frames' first; see `rotate_pairs`.
    """
    q, k, v = project(attention, h_BNE, h_BNE)
    k_BHMD, v_BHMD = after(state.past, (k, v))
    turned = rotate_pairs(q, rotary_2ND[..., -q.shape[2] :, :])
    return out(attention, state.context.attend(turned, rotate_pairs(k_BHMD, rotary_2ND), v_BHMD)), (k, v)


def rotate_pairs(x_BHND: Tensor, rotary_2ND: Tensor) -> Tensor:
    """Turn each pair `(x[2i], x[2i + 1])` by the angle of its token; a table `[2, H, N, D / 2]` has angles of its own for
    every head."""
    cos, sin = rotary_2ND
    a, b = x_BHND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x_BHND.dtype)
