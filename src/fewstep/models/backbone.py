"""The three visible parts of a video network: `embed`, `blocks`, `head`. Nobody installs hooks.

Legend: B batch, F frames, N tokens of this call, M tokens read (cached + this call's), H heads, D head dimension,
E width, L text tokens, G time groups (1 when t is `[B]`, F when t is `[B, F]`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from fewstep.attention import Grid3, KVView
from fewstep.core.types import KV, Cond


class Context(NamedTuple):
    """What every block reads and none changes."""

    modulation_BG6E: Tensor
    text_BLE: Tensor
    text_mask_B11L: Tensor
    rotary_2MD: Tensor
    """Cosines and sines of all M positions; the queries are the last N."""
    mask_NM: Tensor | None


@dataclass(frozen=True)
class State:
    """What flows from block to block."""

    x_BNE: Tensor
    time_BGE: Tensor
    grid: Grid3
    context: Context
    past: KV | None = None
    """In: keys and values the next block may read besides its own."""
    new: KV | None = None
    """Out: keys and values the last block made, keys without rotary position."""

    @property
    def volume(self) -> Tensor:
        """The tokens as `[B, E, F, h, w]`."""
        return self.x_BNE.unflatten(1, self.grid).permute(0, 4, 1, 2, 3)


class Output(NamedTuple):
    """What a backbone returns. `kv` is one entry per block if a view was given, else None."""

    raw: Tensor
    kv: tuple[KV, ...] | None


class Backbone(nn.Module, ABC):
    """A video network: latents `[B, C, F, H, W]`, time `[B]` or `[B, F]` and text in, a tensor like the latents out."""

    args: dict[str, object]
    """Constructor arguments as plain values: what `Spec` needs to build the same network again."""
    width: int
    blocks: nn.ModuleList
    """Each maps State to State."""

    @abstractmethod
    def embed(self, x: Tensor, t: Tensor, cond: Cond, kv: KVView | None = None) -> State: ...

    @abstractmethod
    def head(self, state: State) -> Tensor: ...

    def walk(self, state: State, kv: KVView | None = None) -> Iterator[State]:
        """The state after each block."""
        for index, block in enumerate(self.blocks):
            state = block(replace(state, past=kv.layer(index) if kv else None, new=None))
            yield state

    def forward(self, x: Tensor, t: Tensor, cond: Cond, kv: KVView | None = None) -> Output:
        start, made = self.embed(x, t, cond, kv), []
        for state in self.walk(start, kv):
            if kv is not None:
                made.append(state.new)
        return Output(self.head(state), None if kv is None else tuple(made))

    def compile_blocks(self) -> None:
        """Compile every block in place (one graph serves all). A copy of this network starts uncompiled."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)
