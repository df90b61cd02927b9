"""The first frames for ever, and the newest chunk (ViD-GPT, 2406.10981; Ca2-VDM, 2411.16375)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.slots import ring
from fewstep.core import KV
from fewstep.core.bounds import Natural


@dataclass(frozen=True)
class Prefix(Keep):
    """The first `frames` frames of the stream for ever, and beside them nothing but the newest chunk.

    A stream that continues a given clip has the clip as its prefix.
    """

    frames: Natural = 3
    """First frames that stay."""

    @property
    def pinned(self) -> int:
        return self.frames

    @property
    def leaves_empty(self) -> bool:
        return True

    @property
    def span(self) -> int | None:
        return self.frames + 1

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        return ring(memory, delta, frames, self.frames, self.frames + memory.chunk)[0]
