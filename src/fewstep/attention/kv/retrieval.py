"""The past frames that are most like what is being shown now (MemFlow)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.choosing import chosen
from fewstep.attention.kv.slots import appended, prototypes
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class Retrieval(Keep):
    """All frames are kept; a chunk reads the sink, the newest frames, and the `frames` others that are most like the newest ones.

    The likeness of two frames is the mean over layers and heads of the cosine of their mean keys. The memory grows with the
    stream, and what a chunk reads does not. Not from the paper, whose query is the prompt: here it is the mean key of the newest
    chunk, because a memory does not see the prompt; one choice serves all layers; frames are chosen, not chunks.
    """

    frames: Count = 6
    """Frames that are chosen."""
    recent: Count = 3
    """Newest frames, which are always read."""
    sink: Natural = 3
    """First frames of the stream, which are always read."""

    @property
    def pinned(self) -> int:
        return self.sink

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        new_BfN = prototypes(delta, frames)
        notes = torch.cat([memory.notes[0], new_BfN], 1) if memory.notes else new_BfN
        return replace(appended(memory, delta, frames), notes=(notes,))

    def read(self, memory: KVCache) -> KVCache:
        if not memory.notes:
            return memory
        held_BSN = memory.notes[0]
        newest = held_BSN[:, -memory.chunk :].mean(1)
        score_BS = (held_BSN @ newest[:, :, None])[..., 0]
        return chosen(memory, score_BS, self.sink, self.frames, self.recent)
