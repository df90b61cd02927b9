"""A block of Wan: diffusers' layers around an operation of ours.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from functools import partial

from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from fewstep.attention import Operation, attend
from fewstep.models.adapters.dits.attention import keys, modulated, normalised, out, queries
from fewstep.models.backbone import Context, Tokens, Words, read_text, words_of
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

    def reads(self, context: Context) -> Words:
        """Keys and values of the text and, where there is one, of the image, by weights of their own."""
        attention, dtype = self.attn2, context.modulation_BG6E.dtype
        words, image = words_of(context, lambda text: keys(attention, text, dtype)), context.image_BKE
        if image is None:
            return words
        k, v = normalised(attention.norm_added_k, attention.add_k_proj(image), dtype), attention.add_v_proj(image)
        return words._replace(image=(split_heads(k, attention.heads), split_heads(v, attention.heads)))

    def _cross(self, state: Tokens, x_BNE: Tensor) -> Tensor:
        """What tokens take from the text and from the image."""
        q, words = queries(self.attn2, self.norm2(x_BNE)), state.text or self.reads(state.context)
        read = read_text(q, words, state.context)
        return out(self.attn2, read if words.image is None else read + attend(q, *words.image))
