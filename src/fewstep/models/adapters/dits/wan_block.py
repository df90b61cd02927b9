"""A block of Wan: diffusers' layers around an operation of ours.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from functools import partial

from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from fewstep.attention import Operation, attend
from fewstep.core import KV
from fewstep.models.adapters.dits.attention import keys, modulated, normalised, out, queries
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
        return modulated(self, state, partial(self._cross, state), self.norm3, self.ffn)

    def reads(self, context: Context) -> tuple[KV, ...]:
        """Keys and values of the text and, where there is one, of the image, by weights of their own."""
        attention, dtype = self.attn2, context.modulation_BG6E.dtype
        text, image = keys(attention, context.text_BLE, dtype), context.image_BKE
        if image is None:
            return (text,)
        k, v = normalised(attention.norm_added_k, attention.add_k_proj(image), dtype), attention.add_v_proj(image)
        return text, (split_heads(k, attention.heads), split_heads(v, attention.heads))

    def _cross(self, state: Tokens, x_BNE: Tensor) -> Tensor:
        """What tokens take from the text and from the image."""
        q, (text, *image) = queries(self.attn2, self.norm2(x_BNE)), state.text or self.reads(state.context)
        read = attend(q, *text, state.context.text_mask_B11L)
        return out(self.attn2, sum((attend(q, k, v) for k, v in image), read))
