"""The memory of a streaming model: keys without rotary position, and values, layer by layer. All immutable."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core import KV, KVView


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
