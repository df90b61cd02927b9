"""A block of Wan: diffusers' layers around an operation of ours.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

from fewstep.attention import Operation, attend
from fewstep.models.adapters.dits.attention import modulated, out, project
from fewstep.models.backbone import Context, Tokens
from fewstep.models.video_dit import split_heads


class WanBlock(nn.Module):
    """One of diffusers' blocks: self-attention, cross-attention to the text, MLP; the first and last modulated by time."""

    def __init__(self, block: WanTransformerBlock, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ffn = block.norm3, block.ffn
        self.scale_shift_table = block.scale_shift_table

    def forward(self, state: Tokens) -> Tokens:
        return modulated(self, state, lambda x: _read(self.attn2, self.norm2(x), state.context), self.norm3, self.ffn)


def _read(attention: WanAttention, x_BNE: Tensor, context: Context) -> Tensor:
    """What tokens take from the text and, where there is one, from the image."""
    q, k, v = project(attention, x_BNE, context.text_BLE)
    read = attend(q, k, v, context.text_mask_B11L)
    if context.image_BKE is not None:
        read = read + attend(q, *_project_image(attention, context.image_BKE, x_BNE.dtype))
    return out(attention, read)


def _project_image(attention: WanAttention, image_BKE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the image, by weights of their own."""
    k, v = attention.add_k_proj(image_BKE), attention.add_v_proj(image_BKE)
    with torch.autocast(image_BKE.device.type, enabled=False):
        k = attention.norm_added_k(k.to(dtype)).to(v.dtype)
    return split_heads(k, attention.heads), split_heads(v, attention.heads)
