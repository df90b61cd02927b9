"""Block-causal attention: a chunk of frames reads itself and earlier chunks, all of them or a window."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.attention.kernels import attend
from fewstep.attention.kv import Everything, Keep, KVCache, Window
from fewstep.attention.pattern import Operation, Pattern, Site, frames_of
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class BlockCausal(Pattern):
    """Bidirectional inside a chunk of `chunk` frames, causal between chunks (CausVid, 2412.07772).

    With `window` a chunk reads itself, the first `sink` frames of the clip, and so many of the frames before it that it
    reads `window` frames at most, in all (LongLive, 2509.22622). A memory must end where a chunk ends, so that streaming
    chunk by chunk equals one forward.
    """

    chunk: Count = 1
    """Latent frames per chunk; the last chunk of a clip may be shorter."""
    window: Natural = 0
    """Latent frames that a chunk reads, including the sink and its own frames; 0: all."""
    sink: Natural = 0
    """First frames of the clip that always stay in the window."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"BlockCausal needs chunk >= 1 frame, got {self.chunk}")
        if self.window and not 0 <= self.sink <= self.window - self.chunk:
            raise ValueError(
                f"a window holds its sink and a chunk: window={self.window}, sink={self.sink}, chunk={self.chunk}; raise window"
            )
        if self.sink and not self.window:
            raise ValueError(f"without a window every frame stays in reach; set window, or sink to 0, not {self.sink}")

    @property
    def keep(self) -> Keep:
        """What a memory must hold so that streaming equals this pattern."""
        return Window(window=self.window, sink=self.sink) if self.window else Everything()

    def begin(self) -> KVCache:
        """The memory of a stream that has not begun, with which streaming equals this pattern."""
        return KVCache.empty(self.keep, self.chunk)

    def operation(self, layer: int, heads: int, width: int) -> Operation:
        return _ChunkByChunk(self)

    def check(self, site: Site) -> None:
        if site.beside:
            raise ValueError(
                "text that reads the clip would tell the past of the future; BlockCausal needs cross-attention"
            )
        if site.call.mutual:
            raise ValueError(
                f"chunks that are denoised at once read each other in both directions, and with {self} a chunk reads earlier "
                "ones alone; give the network the pattern Dense, or let the stream have mutual: false"
            )
        if site.call.kv is None:
            return
        if bool((site.call.kv.number % self.chunk).any()):
            raise ValueError(
                f"a memory up to frame {site.call.kv.number.tolist()} ends inside a chunk of {self.chunk}; commit whole "
                "chunks only"
            )
        if self.window and site.past and site.grid.frames > self.chunk:
            raise ValueError(
                f"with a window a call has one chunk of {self.chunk} frames, not {site.grid.frames} frames"
            )

    def reads(self, start: int, stop: int, past: int) -> list[tuple[int, int]]:
        """Runs of frames that the chunk `[start, stop)` reads; `past` frames are remembered, and all of them are read."""
        if not self.window or past:
            return [(0, stop)]
        first = start + self.chunk - (self.window - self.sink)  # of the whole chunk, which the last one may not be
        return [(0, stop)] if first <= self.sink else [(0, self.sink), (first, stop)]


class _ChunkByChunk(Operation):
    """Each chunk of queries reads runs of the keys; there is no mask, and what is not read costs nothing."""

    def __init__(self, pattern: BlockCausal) -> None:
        super().__init__()
        self.causal = pattern

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor | None:
        frames, past = site.grid.frames, site.past
        allowed = torch.zeros(frames, past + frames, dtype=torch.bool, device=q_BHND.device)
        for start, stop in self._chunks(site):
            for low, high in self.causal.reads(past + start, past + stop, past):
                allowed[start:stop, low:high] = True
        if bool(allowed.all()):
            return None
        return allowed.repeat_interleave(site.grid.per_frame, 0).repeat_interleave(site.grid.per_frame, 1)

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        per_frame, past, read = site.grid.per_frame, site.past, []
        if (
            past and site.grid.frames <= self.causal.chunk
        ):  # all that is remembered, which may be less than whole frames
            return attend(q_BHND, k_BHMD, v_BHMD, site.readable_B11M)
        for start, stop in self._chunks(site):
            runs = self.causal.reads(past + start, past + stop, past)
            k, v = (frames_of(x, runs, per_frame) for x in (k_BHMD, v_BHMD))
            keys = site.readable_B11M
            keys = None if keys is None else frames_of(keys, runs, per_frame, 3)
            read.append(attend(q_BHND[:, :, start * per_frame : stop * per_frame], k, v, keys))
        return read[0] if len(read) == 1 else torch.cat(read, 2)

    def _chunks(self, site: Site) -> list[tuple[int, int]]:
        return list(pairwise([*range(0, site.grid.frames, self.causal.chunk), site.grid.frames]))
