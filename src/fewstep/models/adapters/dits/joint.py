"""Blocks of diffusers with joint attention over text and clip, whose attention is an operation of ours.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from fewstep.attention import Grid3, Operation, Pattern, Site, Ulysses, operate
from fewstep.models.adapters.dits.streams import Streams
from fewstep.models.video_dit import merge_heads, split_heads


class JointBlock(nn.Module):
    """A block of diffusers, given what it reads of the state; its attention is an operation of ours."""

    def __init__(self, inner: nn.Module, operation: Operation) -> None:
        super().__init__()
        self.inner, self.operation = inner, operation
        attention: Any = inner.attn1 if hasattr(inner, "attn1") else inner.attn
        attention.set_processor(JointAttention())

    def forward(self, state: Streams) -> Streams:
        rotary = None if state.rotary_2ND is None else tuple(state.rotary_2ND)
        x, text = self.run(state, Seat(self.operation, state.site, state.shared), rotary)
        return replace(state, x_BNE=x, text_BLE=text)

    def run(self, state: Streams, seat: Seat, rotary: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """Diffusers' forward, whose mask is a seat: it goes through the block as it is."""
        x, text = self.inner(state.x_BNE, state.text_BLE, state.time_BE, seat, rotary)
        return x, text


def foreign_name(name: str) -> str:
    """What diffusers calls a parameter of a network whose blocks are joint."""
    return f"transformer_{name.replace('.inner.', '.', 1)}" if name.startswith("blocks.") else name


def joint(
    blocks: Iterable[nn.Module], pattern: Pattern, heads: int, width: int
) -> Iterator[tuple[nn.Module, Operation]]:
    """Each block of diffusers with its operation, for attention of `heads` heads that are `width` channels together."""
    pattern.check(Site(Grid3(1, 1, 1), beside=1))
    return ((block, pattern.operation(layer, heads, width // heads)) for layer, block in enumerate(blocks))


class Seat(NamedTuple):
    """What an attention layer of diffusers is given in place of a mask."""

    operation: Operation
    site: Site
    shared: Ulysses | None

    def read(self, q_BHMD: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> Tensor:
        """Attention of the text's tokens and the clip's, in this order."""
        if self.shared is None:
            return operate(self.operation, q_BHMD, k_BHMD, v_BHMD, self.site)
        q, k, v = (self.shared.to_heads(x, self.site.beside) for x in (q_BHMD, k_BHMD, v_BHMD))
        return self.shared.to_tokens(operate(self.operation, q, k, v, self.site), self.site.beside)


class JointAttention:
    """What diffusers' attention layers of text and clip do, around an operation. Text may have weights of its own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Seat,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _project(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        if getattr(attn, "add_q_proj", None) is None:
            words = _project(attn, encoder_hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        else:
            layers, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            words = _project(attn, encoder_hidden_states, layers, norms)
        mixed = attention_mask.read(*(torch.cat(pair, 2) for pair in zip(words, (q, k, v), strict=True)))
        text, clip = merge_heads(mixed).tensor_split((encoder_hidden_states.shape[1],), 1)
        out = nn.Identity() if getattr(attn, "to_out", None) is None else attn.to_out[0]
        return out(clip), (getattr(attn, "to_add_out", None) or out)(text)


def _project(attn: Any, x: Tensor, layers: tuple[str, ...], norms: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (split_heads(getattr(attn, layer)(x), attn.heads) for layer in layers)
    q, k = (y if (norm := getattr(attn, name)) is None else norm(y) for y, name in zip((q, k), norms, strict=True))
    return q, k, v
