"""The memory of a stream: values, and keys without rotary position, for each layer. All immutable.

What is remembered is of whole chunks: a chunk is committed once, when it is finished, and calls read and write nothing.
Keys are kept before rotation, so that a policy decides where a remembered frame stands.
Legend: B batch, H heads, S frames that are remembered (slots), T tokens of a frame, D head dimension, P numbers of a pose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.attention.kv.slots import appended, frames_of, noted
from fewstep.attention.kv.standing import EMPTY, stand
from fewstep.core import KV
from fewstep.core.bounds import require_bounds
from fewstep.diffusion import Memory, Standing


class Keep(Memory):
    """What a memory holds after a chunk is committed, and what the next chunk reads of it: a frozen dataclass."""

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def pinned(self) -> int:
        """First frames of the stream that always stay in memory."""
        return 0

    @property
    def leaves_empty(self) -> bool:
        """Whether some slots may be empty, so that readers need a mask."""
        return False

    @property
    def folds(self) -> bool:
        """Whether frames that leave are folded into `KVCache.states`, for patterns that read them (`Pattern.folds`)."""
        return False

    @property
    def compresses(self) -> int:
        """Tokens that a learned token stands for, of those that come behind each frame (`Pattern.compresses`); 0: none come."""
        return 0

    @property
    def span(self) -> int | None:
        """Number of the last frames that a memory can be rebuilt from (`streaming.blocks.Chunks.recache`); None: all frames."""
        return None

    def check(self, chunk: int) -> None:
        """ValueError unless this policy can serve chunks of so many frames."""

    @abstractmethod
    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        """`memory` after a chunk of so many frames. It leaves `memory` as it was."""

    def read(self, memory: KVCache) -> KVCache:
        """The part of `memory` that the next chunk reads. Default: all of it."""
        return memory

    def forget(self, memory: KVCache, start: Tensor) -> KVCache:
        """`memory` with no frames but the pinned ones, before frame `start`."""
        return replace(memory.without(memory.positions >= self.pinned), start=start)


@dataclass(frozen=True)
class Everything(Keep):
    """Every frame."""

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        return appended(memory, delta, frames)


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
    chunk: int = 1
    """Frames of the longest chunk."""
    standing: Standing = "absolute"
    """Where remembered frames stand, as rotary embedding is told."""
    weight: float = 1.0
    """How much what is remembered counts in attention (`KVView.weight`)."""
    rows: Tensor | None = None
    """Slot and number in its frame of every token, `[M, 2]` on the CPU; of what is read also how many tokens it stands for, from
    that number on, `[M, 3]`. None: all tokens of all slots, in order."""
    states: tuple[Tensor, ...] = ()
    """What has left, folded into a matrix `[B, H, V, D]` per block (`Keep.folds`); () before anything has."""
    notes: tuple[Tensor, ...] = ()
    """What the policy writes down besides, each `[B, S, ...]`."""
    poses_BfP: Tensor | None = None
    """Poses of the frames that come next, for a policy that chooses by pose."""

    def commit(self, delta: tuple[KV, ...], frames: int) -> KVCache:
        """After a chunk of `frames` frames, by its keys and values in every layer. ValueError unless they fit."""
        if frames < 1 or not delta:
            raise ValueError(f"a chunk has frames, and keys and values in every block; got {frames} and {len(delta)}")
        if frames > self.chunk and self.keep.leaves_empty:
            raise ValueError(
                f"this memory takes chunks of {self.chunk} frames at most, not of {frames}; commit chunk by chunk"
            )
        if self.layers and len(delta) != len(self.layers):
            raise ValueError(f"cache has {len(self.layers)} layers, got keys and values of {len(delta)}")
        return replace(self.keep.commit(self, delta, frames), poses_BfP=None)

    def coming(self, frames: int) -> Tensor:
        """Which frames of the stream the next ones are, `[frames]` or `[B, frames]`."""
        return self.start[..., None] + torch.arange(frames)

    def read(self) -> KVCache:
        """What the next chunk reads, as plain keys and values."""
        return self.keep.read(self)

    def facing(self, poses_BfP: Tensor | None) -> KVCache:
        """The same memory, told from where the frames of the next chunk look. They are remembered with it."""
        return replace(self, poses_BfP=poses_BfP)

    def stand(self, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """Positions of the remembered frames and of the next one, as rotary embedding is told.

        `longest`: length of its table, None without an end.
        """
        return stand(self.standing, self.positions, self.start, self.keep.pinned, self.chunk, longest)

    def keeping(self, slots: Tensor) -> KVCache:
        """A memory of some of the slots: their numbers `[n]`, or of each sample `[B, n]`, on the CPU."""
        held, positions = self.positions.shape[-1], self.positions
        if self.rows is not None:
            return self._keeping_rows(slots)
        layers = tuple((frames_of(k, slots, held), frames_of(v, slots, held)) for k, v in self.layers)
        if slots.ndim == 2:
            positions = positions.expand(len(slots), -1).gather(1, slots)
        else:
            positions = positions[..., slots]
        return replace(self, layers=layers, positions=positions, notes=tuple(noted(n, slots) for n in self.notes))

    def without(self, gone: Tensor) -> KVCache:
        """A memory that has forgotten the slots where `gone` `[S]` or `[B, S]` is True."""
        if self.keep.leaves_empty:
            return replace(self, positions=torch.where(gone, EMPTY, self.positions))
        first = gone if gone.ndim == 1 else gone[0]
        if bool((gone != first).any()):
            raise ValueError("streams of one batch cannot forget different slots; forget before they are one batch")
        if bool(first.all()):
            return replace(self, layers=(), positions=torch.empty(0, dtype=torch.long), notes=(), rows=None)
        return self.keeping((~first).nonzero().flatten())

    def _keeping_rows(self, slots: Tensor) -> KVCache:
        assert self.rows is not None
        hit = self.rows[:, :1] == slots  # [M, n]
        index = hit.any(1).nonzero().flatten()
        rows = torch.stack([hit[index].int().argmax(1), self.rows[index, 1]], 1)
        layers = tuple((k[:, :, index.to(k.device)], v[:, :, index.to(v.device)]) for k, v in self.layers)
        return replace(self, layers=layers, positions=self.positions[slots], rows=rows)

    @property
    def kind(self) -> tuple[object, ...]:
        """What memories of one batch have in common."""
        return self.keep, self.chunk, self.standing, self.weight, self.positions.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, of states, and of what the policy writes down. Numbers of frames are not counted."""
        return sum(x.nbytes for x in (*(x for layer in self.layers for x in layer), *self.notes, *self.states))

    @staticmethod
    def empty(
        keep: Keep = Everything(), chunk: int = 1, standing: Standing = "absolute", weight: float = 1.0
    ) -> KVCache:
        """The memory of a stream that has not begun. ValueError where `keep` cannot serve chunks of up to `chunk` frames."""
        keep.check(chunk)
        return KVCache(keep, chunk=chunk, standing=standing, weight=weight)

    @staticmethod
    def batch(memories: Sequence[KVCache]) -> KVCache:
        """Streams of one policy as one batch; they may differ in age. Their slots must be as many: see `Window`."""
        first = memories[0]
        if any(m.kind != first.kind or not _same_rows(m.rows, first.rows) for m in memories):
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
        notes = tuple(torch.cat(note) for note in zip(*(m.notes for m in memories), strict=True))
        states = tuple(torch.cat(state) for state in zip(*(m.states for m in memories), strict=True))
        return replace(
            first, layers=layers, positions=positions, start=start, notes=notes, states=states, poses_BfP=None
        )


def _same_rows(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
