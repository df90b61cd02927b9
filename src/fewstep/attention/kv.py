"""The memory of a stream: values, and keys without rotary position, for each layer. All immutable.

What is remembered is of whole chunks: a chunk is committed once, when it is finished, and calls read and write nothing.
Keys are kept before rotation, so that a policy decides where a remembered frame stands.
Legend: B batch, H heads, S frames that are remembered (slots), T tokens of a frame, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import KV

EMPTY = -1
"""The position of a slot that holds no frame."""


class Keep(ABC):
    """What a memory holds after a chunk is committed, and where its frames stand: a frozen dataclass."""

    leaves_empty: ClassVar[bool] = False
    """Whether some slots may be empty, so that readers need a mask."""

    @abstractmethod
    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        """`memory` after a chunk of so many frames. It leaves `memory` as it was."""

    def stand(self, memory: KVCache) -> tuple[Tensor, Tensor]:
        """Positions of the remembered frames and of the next one, as rotary embedding is told. Default: their own."""
        return memory.positions, memory.start


@dataclass(frozen=True)
class Everything(Keep):
    """Every frame."""

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        layers = delta
        if memory.layers:
            layers = tuple(
                (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))
                for (old_k, old_v), (k, v) in zip(memory.layers, delta, strict=True)
            )
        positions = torch.cat([memory.positions, memory.coming(frames)], -1)
        return replace(memory, layers=layers, positions=positions, start=memory.start + frames)


@dataclass(frozen=True)
class Window(Keep):
    """The first `sink` frames and the last ones, so many that they and the next chunk are `window` frames.

    Slots are a ring: a new frame takes the place of the oldest that is no sink, and the shapes never change, so one
    compiled graph serves a stream from its second chunk on.
    """

    leaves_empty: ClassVar[bool] = True

    window: int
    """Frames that a chunk reads, including the sink and its own frames, as in `BlockCausal`."""
    chunk: int = 1
    """Frames per chunk; the last chunk may be shorter."""
    sink: int = 0
    """First frames of the stream that always stay in memory."""
    relative: bool = False
    """Whether the sink gets positions next to the window as it moves (LongLive's re-indexing), or keeps its own positions."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sink < 0 or self.slots < max(self.sink, 1):
            raise ValueError(
                f"a window holds its sink, a chunk and a frame of the past at least: window={self.window}, chunk={self.chunk}, "
                f"sink={self.sink}; raise window"
            )

    @property
    def slots(self) -> int:
        """Frames of the past that are kept."""
        return self.window - self.chunk

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        slots = self.slots
        if frames > self.chunk:
            raise ValueError(
                f"this window takes chunks of {self.chunk} frames at most, not of {frames}; commit chunk by chunk"
            )
        if not memory.layers:
            per_frame = delta[0][0].shape[2] // frames
            memory = replace(
                memory,
                layers=tuple((_room(k, slots * per_frame), _room(v, slots * per_frame)) for k, v in delta),
                positions=memory.start[..., None].expand(*memory.start.shape, slots) * 0 + EMPTY,
            )
        new = memory.coming(frames)
        slot = torch.where(new < self.sink, new, self.sink + (new - self.sink) % max(slots - self.sink, 1))
        fits = (new >= self.sink) & (new >= memory.start[..., None] + frames - (slots - self.sink)) | (new < self.sink)
        positions, taken = _written(memory.positions, new, slot, fits)
        layers = tuple(
            (_placed(old_k, k, taken, frames), _placed(old_v, v, taken, frames))
            for (old_k, old_v), (k, v) in zip(memory.layers, delta, strict=True)
        )
        return replace(memory, layers=layers, positions=positions, start=memory.start + frames)

    def stand(self, memory: KVCache) -> tuple[Tensor, Tensor]:
        if not self.relative:
            return memory.positions, memory.start
        away = (memory.start - self.slots).clamp_min(0)[..., None]
        rolling = memory.positions >= self.sink
        return torch.where(rolling, memory.positions - away, memory.positions), memory.start - away[..., 0]


KEEPS: tuple[type[Keep], ...] = (Everything, Window)


@dataclass(frozen=True)
class KVCache:
    """What has been committed so far. `commit` returns another memory and leaves this one as it was.

    Gradients flow through what is committed; commit under `torch.no_grad()` (or detach first) to cut them.
    """

    keep: Keep = Everything()
    layers: tuple[KV, ...] = ()
    """Keys and values of each block, `(k_BHMD, v_BHMD)`, with M = S T."""
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Frame of the stream in each slot, `[S]` or `[B, S]`, on the CPU; -1: empty."""
    start: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    """Number of the next frame, `[]` or `[B]`, on the CPU."""

    def commit(self, delta: tuple[KV, ...], frames: int) -> KVCache:
        """After a chunk of `frames` frames, by its keys and values in every layer. ValueError unless they fit."""
        if frames < 1 or not delta:
            raise ValueError(f"a chunk has frames, and keys and values in every block; got {frames} and {len(delta)}")
        if self.layers and len(delta) != len(self.layers):
            raise ValueError(f"cache has {len(self.layers)} layers, got keys and values of {len(delta)}")
        return self.keep.commit(self, delta, frames)

    def coming(self, frames: int) -> Tensor:
        """Which frames of the stream the next ones are, `[frames]` or `[B, frames]`."""
        return self.start[..., None] + torch.arange(frames)

    @staticmethod
    def empty(keep: Keep = Everything()) -> KVCache:
        """The memory of a stream that has not begun."""
        return KVCache(keep)

    @staticmethod
    def batch(memories: Sequence[KVCache]) -> KVCache:
        """Streams of one policy as one batch; they may differ in age. Their slots must be as many: see `Window`."""
        first = memories[0]
        if any(m.keep != first.keep or m.positions.shape[-1] != first.positions.shape[-1] for m in memories):
            raise ValueError(
                "streams of one batch have one policy and as many slots; use Window, whose slots are all there"
            )
        layers = tuple(
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*(m.layers for m in memories), strict=True)
        )
        sizes = [len(m.layers[0][0]) for m in memories]
        positions = torch.cat([m.positions.expand(n, -1) for n, m in zip(sizes, memories, strict=True)])
        start = torch.cat([m.start.expand(n) for n, m in zip(sizes, memories, strict=True)])
        return KVCache(first.keep, layers, positions, start)


def _room(like: Tensor, tokens: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], tokens, like.shape[3])


def _written(positions: Tensor, new: Tensor, slot: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Positions after frames `new` took their slots, and which of the new frames each slot took (-1: it stays)."""
    here = torch.arange(positions.shape[-1])
    hit = (slot[..., :, None] == here) & fits[..., :, None]  # [..., new, slots]; no two of those that fit share a slot
    order = torch.arange(1, new.shape[-1] + 1)[:, None]
    taken = (hit * order).amax(-2) - 1
    return torch.where(taken >= 0, new.gather(-1, taken.clamp_min(0)), positions), taken


def _placed(old: Tensor, new: Tensor, taken: Tensor, frames: int) -> Tensor:
    """The tokens of every slot: the new frame's that it took, or the old ones."""
    per_frame, taken = new.shape[2] // frames, taken.to(new.device)
    index = taken.clamp_min(0).expand(len(new), -1)[:, None, :, None, None]
    shape = (-1, new.shape[1], -1, per_frame, new.shape[3])
    chosen = new.unflatten(2, (frames, per_frame)).gather(2, index.expand(shape))
    stays = (taken < 0).expand(len(new), -1)[:, None, :, None, None]
    return torch.where(stays, old.unflatten(2, (-1, per_frame)), chosen).flatten(2, 3)
