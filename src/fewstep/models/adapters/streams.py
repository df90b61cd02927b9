"""Transformers of diffusers in which the tokens of a clip and of its text read each other: a state of two streams.

Legend: as in `models/backbone.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from fewstep.attention import Grid3, KVView
from fewstep.models.adapters.ddpm import require_whole_clips
from fewstep.models.backbone import Backbone, State


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

    @property
    def volume(self) -> Tensor:
        return self.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)

    @property
    def detached(self) -> Streams:
        x, text = (tokens.detach().requires_grad_() for tokens in (self.x_BNE, self.text_BLE))
        return replace(self, x_BNE=x, text_BLE=text)


class StreamsBackbone(Backbone):
    """Its blocks are diffusers' own and do the attention themselves: whole clips only, with one time each."""

    network: ClassVar[type[ModelMixin]]
    """The class of diffusers that this family is made of."""
    folders: ClassVar[tuple[str, ...]] = ("transformer",)
    channels: int
    patch: int

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        self._hold(
            self.network.from_pretrained(
                folder, subfolder=self.folders[0], torch_dtype=torch.float32, use_safetensors=True
            )
        )

    @abstractmethod
    def _hold(self, network: Any) -> None:
        """Make the modules of `network` this backbone's own."""

    def _grid(self, x: Tensor, t: Tensor, kv: KVView | None) -> Grid3:
        _, channels, frames, height, width = x.shape
        if channels != self.channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"latents [B, C, F, H, W] need C = {self.channels} and H, W multiples of {self.patch}, got {tuple(x.shape)}"
            )
        require_whole_clips(type(self).__name__, x, t, kv)
        return Grid3(frames, height // self.patch, width // self.patch)


class StreamsBlock(nn.Module):
    """A block of diffusers, given what it reads of the state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Streams) -> Streams:
        mask = () if state.mask is None else (state.mask,)
        rotary = None if state.rotary_2ND is None else tuple(state.rotary_2ND)
        x, text = self.inner(state.x_BNE, state.text_BLE, state.time_BE, *mask, rotary)
        return replace(state, x_BNE=x, text_BLE=text)
