"""A window, and fewer tokens that stand for each frame that has left it (LoViC's FlexFormer, 2507.12952)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.attention.kv.window import require_past
from fewstep.core import KV
from fewstep.core.bounds import Count, Natural


@dataclass(frozen=True)
class CompressedMemory(Keep):
    """A window with a sink; of each of the `past` frames before the window one token in `ratio` is left, which was learned.

    It is for networks with the pattern `CompressCausal` of this ratio, which makes these tokens of every frame, behind its own. A
    token stands in the middle of those that it stands for. Bytes do not grow with the stream after the first `window + past`
    frames. Streams of one batch have one age.
    """

    window: Count = 12
    """Frames that a chunk reads with all their tokens, including the sink and its own frames."""
    sink: Natural = 3
    """First frames of the stream, of which all tokens stay."""
    past: Count = 24
    """Frames before the window that are read compressed. Older ones are forgotten."""
    ratio: Count = 4
    """Tokens of a row that one learned token stands for."""

    def check(self, chunk: int) -> None:
        require_past(self.window, self.sink, chunk, 1)

    @property
    def pinned(self) -> int:
        return self.sink

    @property
    def compresses(self) -> int:
        return self.ratio

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        if memory.start.ndim:
            raise ValueError("a memory of compressed frames serves streams of one age; keep them apart, or use Window")
        each, held = delta[0][0].shape[2] // frames, len(memory.positions)
        learned, odd = divmod(each, self.ratio + 1)
        if odd:
            raise ValueError(
                f"{each} tokens of a frame are not its own and one for each {self.ratio} of them behind; give the network the "
                f"pattern CompressCausal(ratio={self.ratio})"
            )
        own = torch.cat([torch.arange(each - learned), -1 - torch.arange(learned)]).repeat(frames)
        new = torch.stack([held + torch.arange(frames).repeat_interleave(each), own], 1)
        rows = new if memory.rows is None else torch.cat([memory.rows, new])
        positions, start = torch.cat([memory.positions, memory.coming(frames)]), memory.start + frames
        first = start - self._room(memory.chunk)
        where, whole = positions[rows[:, 0]], rows[:, 1] >= 0
        index = torch.where(whole, (where < self.sink) | (where >= first), where >= first - self.past)
        index = (index & (whole | (where >= self.sink))).nonzero().flatten()
        kept = torch.zeros_like(positions, dtype=torch.bool).index_fill(0, rows[index, 0], True)
        number = kept.cumsum(0) - 1  # slots without tokens are gone
        rows = torch.stack([number[rows[index, 0]], rows[index, 1]], 1)
        old = memory.layers or tuple((k[:, :, :0], v[:, :, :0]) for k, v in delta)
        layers = tuple(
            (_chosen(old_k, k, index), _chosen(old_v, v, index))
            for (old_k, old_v), (k, v) in zip(old, delta, strict=True)
        )
        return replace(memory, layers=layers, positions=positions[kept], start=start, rows=rows)

    def read(self, memory: KVCache) -> KVCache:
        """Frames of the window and the sink with all their tokens, the others with the learned ones. `rows` say how many tokens
        each stands for; in a memory, learned ones have the numbers -1, -2, ..."""
        if memory.rows is None:
            return memory
        first = memory.start - self._room(memory.chunk)
        index = ((memory.rows[:, 1] >= 0) | (memory.positions[memory.rows[:, 0]] < first)).nonzero().flatten()
        slot, own = memory.rows[index].unbind(1)
        whole = own >= 0
        begin, count = torch.where(whole, own, (-1 - own) * self.ratio), torch.where(whole, 1, self.ratio)
        layers = tuple((k[:, :, index.to(k.device)], v[:, :, index.to(v.device)]) for k, v in memory.layers)
        return replace(memory, layers=layers, rows=torch.stack([slot, begin, count], 1))

    def _room(self, chunk: int) -> int:
        """Frames of the window that are remembered, without the sink."""
        return self.window - chunk - self.sink


def _chosen(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    return torch.cat([old, new], 2)[:, :, index.to(new.device)]
