"""A sink that follows the stream (Reward Forcing, 2512.04678)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.slots import frames_of, leaving, ring, with_room
from fewstep.attention.kv.window import require_past
from fewstep.core import KV
from fewstep.core.bounds import Count, Fraction


@dataclass(frozen=True)
class MovingSink(Keep):
    """A window whose sink is a moving average: a frame that leaves the window updates it.

        K_S <- decay K_S + (1 - decay) K_leaving,   V_S likewise

    Keys are not rotated. With decay 1 it is `Window`, bit for bit. Not from the paper, which has no public code: which frame of
    the sink a leaving frame updates (frame n updates n mod `sink`), and the value of `decay`.
    """

    window: Count = 12
    """Frames that a chunk reads, including the sink and its own frames."""
    sink: Count = 3
    """Frames of the sink. They begin as the first frames of the stream."""
    decay: Fraction = 0.99
    """Weight of the sink as it was, from 0 to 1 (alpha)."""

    def check(self, chunk: int) -> None:
        require_past(self.window, self.sink, chunk, chunk)  # so that a frame is in the window before it leaves it

    @property
    def pinned(self) -> int:
        return self.sink

    @property
    def leaves_empty(self) -> bool:
        return True

    @property
    def span(self) -> int | None:
        return self.window

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        slots = self.window - memory.chunk
        before = with_room(memory, delta, frames, slots)
        after, taken = ring(before, delta, frames, self.sink, slots)
        for left in leaving(before, taken, frames, self.sink):
            after = replace(after, layers=self._moved(before, after, left))
        return after

    def _moved(self, before: KVCache, after: KVCache, left: Tensor) -> tuple[KV, ...]:
        """All layers after the slot where `left` `[S]` or `[B, S]` is True, at most one, updated its frame of the sink."""
        slot = left.int().argmax(-1, keepdim=True)
        target = before.positions.gather(-1, slot) % self.sink
        here = (torch.arange(left.shape[-1]) == target) & left.any(-1, keepdim=True)

        def moved(old: Tensor, now: Tensor) -> Tensor:
            leaving = frames_of(old, slot, left.shape[-1]).unflatten(2, (1, -1))
            sink = now.unflatten(2, (left.shape[-1], -1))
            chosen = here.expand(len(now), -1)[:, None, :, None, None].to(now.device)
            return torch.where(chosen, self.decay * sink + (1 - self.decay) * leaving, sink).flatten(2, 3)

        return tuple(
            (moved(old_k, k), moved(old_v, v))
            for (old_k, old_v), (k, v) in zip(before.layers, after.layers, strict=True)
        )
