"""Diffusers transformers with joint attention over clip and text tokens: a state of two streams.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from fewstep.attention import Grid3, Operation, Pattern, Site, Ulysses, operate
from fewstep.core import Call
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import State
from fewstep.models.video_dit import merge_heads, split_heads, unpatchify


@dataclass(frozen=True)
class Streams(State):
    """What flows from block to block, and what every block reads."""

    x_BNE: Tensor
    text_BLE: Tensor
    time_BE: Tensor
    grid: Grid3
    site: Site
    rotary_2ND: Tensor | None = None
    """Cosines and sines of the clip's tokens; None if positions were added to the tokens."""
    shared: Ulysses | None = None
    """Processes that hold the other tokens of these clips; None if clips are not shared. All of them have the text."""

    @property
    def volume(self) -> Tensor:
        return self.joined.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def streams(self) -> tuple[Tensor, ...]:
        return self.x_BNE, self.text_BLE

    def with_streams(self, streams: Sequence[Tensor]) -> Streams:
        return replace(self, x_BNE=streams[0], text_BLE=streams[1])

    def split(self, processes: Ulysses) -> Streams:
        """This process' share of the clip's tokens, with their positions."""
        rotary = None if self.rotary_2ND is None else processes.split(self.rotary_2ND, 1)
        return replace(self, x_BNE=processes.split(self.x_BNE, 1), rotary_2ND=rotary, shared=processes)

    @property
    def joined(self) -> Streams:
        if self.shared is None:
            return self
        return replace(self, x_BNE=self.shared.join(self.x_BNE, 1), shared=None)


class StreamsBackbone(DiffusersBackbone):
    """Its blocks are diffusers' own, but for what they read of each other: whole clips only, with one time each."""

    block: ClassVar[type[StreamsBlock]]
    pattern: Pattern
    heads: int
    channels: int
    patch: int
    norm_out: nn.Module
    proj_out: nn.Module

    def foreign(self, name: str) -> str:
        return f"transformer_{name.replace('.inner.', '.', 1)}" if name.startswith("blocks.") else name

    def head(self, state: Streams) -> Tensor:
        with torch.autocast(state.x_BNE.device.type, enabled=False):
            tokens = self.proj_out(self.norm_out(state.x_BNE, state.time_BE))
        return unpatchify(tokens, state.grid, self.patch)

    def _grid(self, x: Tensor, t: Tensor, call: Call) -> Grid3:
        _, channels, frames, height, width = x.shape
        if channels != self.channels or frames % self.patch_frames or height % self.patch or width % self.patch:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.channels}, F a multiple of {self.patch_frames} and H, W multiples "
                f"of {self.patch}, got {tuple(x.shape)}"
            )
        require_whole_clips(type(self).__name__, x, t, call)
        return Grid3(frames // self.patch_frames, height // self.patch, width // self.patch)

    def _site_beside(self, grid: Grid3, call: Call, x: Tensor, text: int, mask_BL: Tensor | None = None) -> Site:
        """Where self-attention is, with so many tokens of text, of which those of the mask are read (None: all)."""
        site = replace(self.site(self.pattern, grid, call, x.device), beside=text)
        self.pattern.check(site)
        if mask_BL is None:
            return site
        readable = torch.cat([mask_BL, mask_BL.new_ones(len(x), grid.tokens)], 1)
        return replace(site, readable_B11M=readable[:, None, None])

    def _blocks(self, blocks: Iterable[nn.Module]) -> nn.ModuleList:
        self.pattern.check(Site(Grid3(1, 1, 1), beside=1))
        width = self.width // self.heads
        made = (self.block(block, self.pattern.operation(i, self.heads, width)) for i, block in enumerate(blocks))
        return nn.ModuleList(made)


class StreamsBlock(nn.Module):
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
