"""Blocks of diffusers as in Wan and LTX: modulated by time, with queries and keys normalised over all heads together.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention import Operation
from fewstep.core import KV
from fewstep.models.backbone import Tokens, read
from fewstep.models.video_dit import gate, merge_heads, modulate, split_heads


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


def modulated(block: Any, state: Tokens, cross: Callable[[Tensor], Tensor], norm: nn.Module, mlp: nn.Module) -> Tokens:
    """A block's forward: self-attention, `cross` to the text, `norm` and `mlp`; the first and last are modulated by time."""
    x = state.x_BNE
    parts = (block.scale_shift_table + state.context.modulation_BG6E).unbind(2)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
    read, new = read_frames(block.attn1, modulate(block.norm1(x), shift_a, scale_a), state, block.operation)
    x = x + gate(read, gate_a)
    x = x + cross(x)
    x = x + gate(mlp(modulate(norm(x), shift_m, scale_m)), gate_m)
    return replace(state, x_BNE=x, new=new)
