"""A cache of values in main memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")

ROOM = 2**31
"""Largest size in bytes. Beyond it the oldest values are dropped; they are made again when needed."""


class Remembered(Generic[K, V]):
    """Calls `make` once per key and keeps the value; `tensors` lists the tensors of a value, whose sizes count."""

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
