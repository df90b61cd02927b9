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
from fewstep.models.video_dit import gated, merge_heads, modulate, split_heads


def queries(attention: Any, x_BNE: Tensor) -> Tensor:
    """Queries of x by heads."""
    return split_heads(normalised(attention.norm_q, attention.to_q(x_BNE), x_BNE.dtype), attention.heads)


def keys(attention: Any, source_BME: Tensor, dtype: torch.dtype) -> KV:
    """Keys and values of the source by heads; `dtype` is that of latents."""
    k, v = normalised(attention.norm_k, attention.to_k(source_BME), dtype), attention.to_v(source_BME)
    return split_heads(k, attention.heads), split_heads(v, attention.heads)


def normalised(norm: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` after its norm, which is computed as `dtype`."""
    with torch.autocast(y.device.type, enabled=False):
        made: Tensor = norm(y.to(dtype)).to(y.dtype)
    return made


def out(attention: Any, mixed_BHND: Tensor) -> Tensor:
    """What the layer makes of the values that its queries read."""
    linear: Tensor = attention.to_out[0](merge_heads(mixed_BHND))
    return linear


def read_frames(attention: Any, h_BNE: Tensor, state: Tokens, operation: Operation) -> tuple[Tensor, KV]:
    """What tokens read from each other and from earlier frames, and their own keys and values for later ones."""
    qkv = (queries(attention, h_BNE), *keys(attention, h_BNE, h_BNE.dtype))
    mixed, new = read(operation, qkv, state)
    return out(attention, mixed), new


def modulated(block: Any, state: Tokens, cross: Callable[[Tensor], Tensor], norm: nn.Module, mlp: nn.Module) -> Tokens:
    """A block's forward: self-attention, `cross` to the text, `norm` and `mlp`; the first and last are modulated by time."""
    x = state.x_BNE
    parts = (block.scale_shift_table + state.context.modulation_BG6E).unbind(2)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
    read, new = read_frames(block.attn1, modulate(block.norm1(x), shift_a, scale_a), state, block.operation)
    x = gated(x, read, gate_a)
    x = x + cross(x)
    x = gated(x, mlp(modulate(norm(x), shift_m, scale_m)), gate_m)
    return replace(state, x_BNE=x, new=new)
