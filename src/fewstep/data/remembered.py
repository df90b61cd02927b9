"""A cache in main memory, for values that may be needed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")

ROOM = 2**31
"""Bytes. Beyond them the oldest is forgotten, and made again when it comes back."""


class Remembered(Generic[K, V]):
    """What `make` makes of a key, once; `tensors` are those that it holds."""

    def __init__(self, make: Callable[[K], V], tensors: Callable[[V], Iterable[Tensor]]) -> None:
        self.make, self.tensors = make, tensors
        self.known: dict[K, V] = {}
        self.bytes = 0

    def __call__(self, key: K) -> V:
        if key not in self.known:
            made = self.known[key] = self.make(key)
            self.bytes += self._size(made)
            while self.bytes > ROOM and len(self.known) > 1:
                self.bytes -= self._size(self.known.pop(next(iter(self.known))))
        return self.known[key]

    def _size(self, made: V) -> int:
        return sum(x.nbytes for x in self.tensors(made))
