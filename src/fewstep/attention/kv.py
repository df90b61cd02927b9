"""The memory of a streaming model: keys without rotary position, and values, layer by layer. All immutable."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core.types import KV


@dataclass(frozen=True)
class KVView:
    """What one forward call may read of the past. An empty view asks for keys and values but offers none."""

    layers: tuple[KV, ...]
    """One `(k_BHMD, v_BHMD)` per block; empty at the start of a stream."""
    frames: int
    """How many frames they cover: the first frame of the call has this index."""

    def layer(self, index: int) -> KV | None:
        return self.layers[index] if self.layers else None


@dataclass(frozen=True)
class KVCache:
    """Everything committed so far. `commit` returns a longer cache and leaves this one as it was.

    Gradients flow through what is committed; commit under `torch.no_grad()` (or detach first) to cut them.
    """

    layers: tuple[KV, ...] = ()
    frames: int = 0

    @staticmethod
    def empty() -> KVCache:
        return KVCache()

    def commit(self, delta: tuple[KV, ...], frames: int) -> KVCache:
        """Append the keys and values of `frames` new frames, one pair per layer."""
        if self.layers and len(delta) != len(self.layers):
            raise ValueError(f"cache has {len(self.layers)} layers, got keys and values of {len(delta)}")
        if not self.layers:
            return KVCache(delta, frames)
        longer = (
            (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))
            for (old_k, old_v), (k, v) in zip(self.layers, delta, strict=True)
        )
        return KVCache(tuple(longer), self.frames + frames)

    def view(self) -> KVView:
        return KVView(self.layers, self.frames)
