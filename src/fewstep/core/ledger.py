"""Count memory and operations: every tensor for as long as it lives, whether or not it has values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from fewstep.core.flops import FORMULAS


class Ledger(TorchDispatchMode):
    """Counts inside a `with` block: bytes of new tensors (now and at most), which `owners` were read, and operations.

    `left` tells the largest number of bytes without those of tensors that were set `aside`.
    """

    def __init__(self, owners: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._aside: dict[int, tuple[str, int]] = {}
        self._sums: Counter[str] = Counter()
        self._left: dict[frozenset[str], int] = {}
        self.reads: set[str] = set()
        self._alive: dict[int, Any] = {}
        self._owned: dict[int, tuple[str, Any]] = {}
        for name, network in (owners or {}).items():
            for tensor in (*network.parameters(), *network.buffers()):
                storage = tensor.untyped_storage()
                self._owned.setdefault(id(storage), (name, storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (owned := self._owned.get(id(leaf.untyped_storage()))):
                self.reads.add(owned[0])
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        formula: Any = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, args)
            self.flops += formula(*shapes)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the memory behind `tensor`, once, until nothing refers to it."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._owned or not size:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        for kinds, most in self._left.items():
            left = self.live
            for kind in kinds:
                left -= self._sums[kind]
            if left > most:
                self._left[kinds] = left

    def aside(self, tensor: Tensor, kind: str) -> Tensor:
        """From now on the memory behind `tensor` counts as of this `kind`; the tensor itself."""
        storage = tensor.untyped_storage()
        if id(storage) in self._alive and id(storage) not in self._aside:
            self._aside[id(storage)] = kind, storage.nbytes()
            self._sums[kind] += storage.nbytes()
        return tensor

    def watch(self, *kinds: str) -> None:
        """Count from now on what `left` tells of these kinds."""
        self._left[frozenset(kinds)] = self.live

    def left(self, *kinds: str) -> int:
        """The most bytes at any time without those of these kinds, which are watched."""
        return self._left[frozenset(kinds)]

    def _forget(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.live -= size
            if key in self._aside:
                kind, _ = self._aside.pop(key)
                self._sums[kind] -= size
