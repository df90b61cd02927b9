"""Fewer and fewer tokens of a frame the older it gets (PackCache, 2601.04359)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.kv.cache import Keep, KVCache
from fewstep.core import KV
from fewstep.core.bounds import Natural, Positive


@dataclass(frozen=True)
class Decaying(Keep):
    """All T tokens of a frame in the sink or in the newest chunk, and `round(T 2^(-d / half))` of a frame that is d frames older.

    Tokens keep the positions that they had in their frame. A frame without tokens is forgotten, so the memory does not grow with
    the stream. From the paper: anchors (here the sink), and budgets that decay with distance. Not from the paper: this curve,
    `half`, and which tokens stay. They are spread over the frame, and those that stay are among those that stayed before.
    """

    half: Positive = 6.0
    """Frames after which half of a frame's tokens are left."""
    sink: Natural = 3
    """First frames of the stream, of which all tokens stay."""

    @property
    def pinned(self) -> int:
        return self.sink

    def budgets(self, positions: Tensor, start: Tensor, chunk: int, tokens: int) -> Tensor:
        """Tokens of each frame at `positions` that stay in the memory before frame `start`."""
        away = (start[..., None] - chunk - positions).clamp_min(0)
        left = (tokens * 2.0 ** (-away.double() / self.half)).round().long()
        return torch.where(positions < self.sink, tokens, left)

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        if memory.start.ndim:
            raise ValueError(
                "a memory that keeps fewer tokens of a frame with age serves streams of one age; keep them apart, or use Window"
            )
        tokens, held = delta[0][0].shape[2] // frames, len(memory.positions)
        slots, own = torch.arange(frames).repeat_interleave(tokens), torch.arange(tokens).repeat(frames)
        new = torch.stack([held + slots, own], 1)
        rows = new if memory.rows is None else torch.cat([memory.rows, new])
        positions, start = torch.cat([memory.positions, memory.coming(frames)]), memory.start + frames
        budget = self.budgets(positions, start, frames, tokens)
        stays = order_of(tokens)[rows[:, 1]] < budget[rows[:, 0]]
        number = (budget > 0).cumsum(0) - 1  # slots without tokens are gone
        rows, index = torch.stack([number[rows[:, 0]], rows[:, 1]], 1)[stays], stays.nonzero().flatten()
        old = memory.layers or tuple((k[:, :, :0], v[:, :, :0]) for k, v in delta)
        layers = tuple(
            (torch.cat([old_k, k], 2)[:, :, index.to(k.device)], torch.cat([old_v, v], 2)[:, :, index.to(v.device)])
            for (old_k, old_v), (k, v) in zip(old, delta, strict=True)
        )
        return replace(memory, layers=layers, positions=positions[budget > 0], start=start, rows=rows)


def order_of(tokens: int) -> Tensor:
    """The order in which tokens leave, last first: steps of the golden section, so that the first n are spread over the frame."""
    place = (torch.arange(tokens, dtype=torch.float64) * (5**0.5 - 1) / 2) % 1
    return place.argsort().argsort()
