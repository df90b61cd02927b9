"""The first frames and the last ones (LongLive, 2509.22622)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.slots import ring
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class Window(Keep):
    """The first `sink` frames and the last ones, so many that they and the next chunk are `window` frames.

    Slots are a ring: a new frame takes the place of the oldest that is no sink, and the shapes never change, so one
    compiled graph serves a stream from its second chunk on.
    """

    window: Count = 12
    """Frames that a chunk reads, including the sink and its own frames, as in `BlockCausal`."""
    sink: Natural = 0
    """First frames of the stream that always stay in memory."""

    def check(self, chunk: int) -> None:
        require_past(self.window, self.sink, chunk, 0 if self.sink else 1)

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
        return ring(memory, delta, frames, self.sink, self.window - memory.chunk)[0]


def require_past(window: int, sink: int, chunk: int, others: int) -> None:
    """ValueError unless a window holds a sink, a chunk, and so many other frames of the past."""
    if chunk < 1 or sink < 0 or window - chunk < sink + others:
        what = f" and {others} more of the past" if others else ""
        raise ValueError(
            f"a window of {window} frames cannot hold a sink of {sink} and a chunk of {chunk}{what}; raise window to "
            f"{sink + chunk + others}"
        )
