"""Transformers of diffusers in which the tokens of a clip and of its text read each other: a state of two streams.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.attention import Grid3, Ulysses
from fewstep.core import Call
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.adapters.network import DiffusersBackbone
from fewstep.models.backbone import State
from fewstep.models.video_dit import unpatchify


@dataclass(frozen=True)
class Streams(State):
    """What flows from block to block, and what every block reads."""

    x_BNE: Tensor
    text_BLE: Tensor
    time_BE: Tensor
    grid: Grid3
    rotary_2ND: Tensor | None = None
    """Cosines and sines of the clip's tokens; None where positions were added to them instead."""
    mask: Tensor | None = None
    """Which tokens may be read, as the blocks want it; None: all of them, padding included."""
    shared: Ulysses | None = None
    """The processes that hold the other tokens of these clips, if they are shared. All of them have the text."""

    @property
    def volume(self) -> Tensor:
        return self.joined.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def detached(self) -> Streams:
        x, text = (tokens.detach().requires_grad_() for tokens in (self.x_BNE, self.text_BLE))
        return replace(self, x_BNE=x, text_BLE=text)

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
    """Its blocks are diffusers' own and do the attention themselves: whole clips only, with one time each."""

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


class StreamsBlock(nn.Module):
    """A block of diffusers, given what it reads of the state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Streams) -> Streams:
        mask = () if state.mask is None else (state.mask,)
        rotary = None if state.rotary_2ND is None else tuple(state.rotary_2ND)
        shared = () if state.shared is None else ({"shared": state.shared},)
        x, text = self.inner(state.x_BNE, state.text_BLE, state.time_BE, *mask, rotary, *shared)
        return replace(state, x_BNE=x, text_BLE=text)
