"""A window, and a state of fixed size for what has left it (VideoSSM, 2512.04519)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.delta_rule import empty_state, folded
from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.slots import frames_of, leaving, ring, with_room
from fewstep.attention.kv.window import require_past
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class StateMemory(Keep):
    """A window with a sink, and in each layer a matrix per head into which the tokens of a frame are folded when it leaves.

    It is for networks with the pattern `StateCausal`, which makes the gates of every token (two more channels of its values) and
    reads the state. Keys and values without gates leave no trace in the state. Bytes do not grow with the stream.
    """

    window: Count = 12
    """Frames that a chunk reads, including the sink and its own frames."""
    sink: Natural = 3
    """First frames of the stream that always stay in memory, and are never folded."""

    def check(self, chunk: int) -> None:
        require_past(self.window, self.sink, chunk, chunk)  # so that a frame is in the window before it leaves it

    @property
    def pinned(self) -> int:
        return self.sink

    @property
    def leaves_empty(self) -> bool:
        return True

    @property
    def folds(self) -> bool:
        return True

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        slots = self.window - memory.chunk
        before = with_room(memory, delta, frames, slots)
        after, taken = ring(before, delta, frames, self.sink, slots)
        if all(k.shape[-1] == v.shape[-1] for k, v in delta):
            return after
        states = memory.states or tuple(empty_state(k, k.shape[-1]) for k, _ in delta)
        for left in leaving(before, taken, frames, self.sink):
            states = tuple(_after(state, kv, left) for state, kv in zip(states, before.layers, strict=True))
        return replace(after, states=states)

    def read(self, memory: KVCache) -> KVCache:
        """Without the gates."""
        return replace(memory, layers=tuple((k, v[..., : k.shape[-1]]) for k, v in memory.layers))

    def forget(self, memory: KVCache, start: Tensor) -> KVCache:
        return replace(super().forget(memory, start), states=())


def _after(state: Tensor, kv: KV, left: Tensor) -> Tensor:
    """A layer's state after the tokens of the slot where `left` `[S]` or `[B, S]` is True, at most one."""
    slot = left.int().argmax(-1, keepdim=True)
    k, v = (frames_of(x, slot, left.shape[-1]).to(state.dtype) for x in kv)
    v, decay, strength = v[..., :-2], v[..., -2], v[..., -1]
    there = left.any(-1).expand(len(k))[:, None, None, None].to(k.device)
    return torch.where(there, folded(state, k, v, decay, strength), state)
