"""Randomness as a function of `(seed, step, name, place)`: nothing to save, nothing to broadcast."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """A source of named standard normal numbers."""

    def randn(self, shape: tuple[int, ...] | torch.Size, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Seeds:
    """One seed per clip of a batch: a clip's noise does not depend on which batch it is sampled in."""

    seeds: tuple[int, ...]
    device: str = "cpu"

    def randn(self, shape: tuple[int, ...] | torch.Size, name: str) -> Tensor:
        """Standard normal float32 `shape`, whose first axis is the clips'."""
        if shape[0] != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds were given for {shape[0]} clips")
        rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(_hash(s, name))) for s in self.seeds]
        return torch.stack(rows).to(self.device)

    def fold(self, name: str) -> Seeds:
        """The same clips' seeds for a sub-procedure: all its numbers are others."""
        return replace(self, seeds=tuple(_hash(seed, name) for seed in self.seeds))


@dataclass(frozen=True)
class Rng:
    """Names random numbers instead of drawing them from a stream.

    `shared(name)` is equal on every data-parallel place, `local(name)` differs per place. The same
    `(seed, step, name, place)` always gives the same numbers, so resume needs no RNG state.

    >>> a, b = Rng(0, step=1, place=0), Rng(0, step=1, place=1)
    >>> a.integer("exit", 4) == b.integer("exit", 4)
    True
    """

    seed: int
    step: int = 0
    place: int = 0
    device: str = "cpu"

    def shared(self, name: str) -> torch.Generator:
        return self._generator(name, "everywhere")

    def local(self, name: str) -> torch.Generator:
        return self._generator(name, self.place)

    def at(self, *, step: int | None = None, place: int | None = None) -> Rng:
        return replace(self, step=self.step if step is None else step, place=self.place if place is None else place)

    def fold(self, name: str) -> Rng:
        """A child whose numbers are all different from the parent's: for a loop or a sub-procedure."""
        return replace(self, seed=_hash(self.seed, name))

    def randn(self, shape: tuple[int, ...] | torch.Size, name: str) -> Tensor:
        """Standard normal float32, local to this place. Drawn on the CPU: every device sees the same numbers."""
        return torch.randn(shape, generator=self.local(name)).to(self.device)

    def rand(self, shape: tuple[int, ...] | torch.Size, name: str) -> Tensor:
        """Uniform in [0, 1), float32, local to this place."""
        return torch.rand(shape, generator=self.local(name)).to(self.device)

    def integer(self, name: str, high: int) -> int:
        """One integer in [0, high), shared by all places: exit steps must agree across ranks."""
        return int(torch.randint(high, (), generator=self.shared(name)))

    def integers(self, shape: tuple[int, ...], name: str, high: int) -> Tensor:
        """Integers in [0, high), int64, local to this place."""
        return torch.randint(high, shape, generator=self.local(name)).to(self.device)

    def _generator(self, name: str, place: object) -> torch.Generator:
        return torch.Generator().manual_seed(_hash(self.seed, self.step, name, place))


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
