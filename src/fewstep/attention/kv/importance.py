"""The frames that matter most to the newest chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.slots import placed, prototypes, with_room
from fewstep.attention.kv.window import require_past
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class Importance(Keep):
    """As many frames as a window, but the least important frame leaves instead of the oldest one.

    The score of a frame is q . mean(K): the mean over layers and heads of the cosine between its mean key and the mean key of the
    chunk that comes in. The sink and the chunk that comes in never leave. Not from a paper: keys of the newest chunk stand in for
    queries, which a memory does not see, and cosines for products. Untested on large models.
    """

    window: Count = 12
    """Frames that a chunk reads, including the sink and its own frames."""
    sink: Natural = 0
    """First frames of the stream that always stay in memory."""

    def check(self, chunk: int) -> None:
        require_past(self.window, self.sink, chunk, chunk)

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
        new_BfN = prototypes(delta, frames)
        slots, batch = self.window - memory.chunk, len(new_BfN)
        memory = with_room(memory, delta, frames, slots)
        memory = replace(memory, positions=memory.positions.expand(batch, -1))
        held_BSN = memory.notes[0] if memory.notes else new_BfN.new_zeros(batch, slots, new_BfN.shape[2])
        score_BS = (held_BSN @ new_BfN.mean(1)[:, :, None])[..., 0].detach().float().cpu()
        score_BS = score_BS.masked_fill(memory.positions < self.sink, torch.inf).masked_fill(
            memory.positions < 0, -torch.inf
        )
        leaves_Bf = score_BS.argsort(dim=-1, stable=True)[:, :frames]  # empty slots first
        taken_BS = torch.full_like(memory.positions, -1).scatter(1, leaves_Bf, torch.arange(frames).expand(batch, -1))
        index_BSN = taken_BS.clamp_min(0)[..., None].to(new_BfN.device)
        stays_BSN = (taken_BS < 0)[..., None].to(new_BfN.device)
        notes = torch.where(stays_BSN, held_BSN, torch.take_along_dim(new_BfN, index_BSN, 1))
        return replace(placed(memory, delta, frames, taken_BS), notes=(notes,))
