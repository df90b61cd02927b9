"""Keys and values in 8 bits, whatever the policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention.kv.cache import Everything, Keep, KVCache
from fewstep.attention.kv.slots import frames_of
from fewstep.core import KV


@dataclass(frozen=True)
class Int8Memory(Keep):
    """The memory of another policy, with the sink and the newest chunk as they are and all other frames as int8.

    Keys have a scale per channel (of a frame, head and layer, before rotation), values one per token (KIVI, 2402.02750, has the
    same split at 2 bits). Scales are bfloat16, so that a frame that is read and stored again is the same to the last bit, however
    often. What a chunk reads is made in full precision for that chunk.
    """

    keep: Keep = Everything()
    """Which frames are remembered."""

    def check(self, chunk: int) -> None:
        if isinstance(self.keep, Int8Memory):
            raise ValueError("a memory is stored as int8 once; leave out the inner Int8Memory")
        self.keep.check(chunk)

    @property
    def pinned(self) -> int:
        return self.keep.pinned

    @property
    def leaves_empty(self) -> bool:
        return self.keep.leaves_empty

    @property
    def span(self) -> int | None:
        return self.keep.span

    def commit(self, memory: KVCache, delta: tuple[KV, ...], frames: int) -> KVCache:
        wide = tuple((k.to(_wide(k)), v.to(_wide(v))) for k, v in delta)
        plain = self.keep.commit(self.opened(memory, wide[0][0].dtype), wide, frames)
        if plain.rows is not None:
            raise ValueError(
                f"int8 needs whole frames, and {type(self.keep).__name__} keeps parts of them; choose another policy or leave "
                "Int8Memory out"
            )
        return self._packed(plain, delta[0][0].dtype)

    def read(self, memory: KVCache) -> KVCache:
        if not memory.layers:
            return memory
        return self.keep.read(self.opened(memory, memory.layers[0][0].dtype))

    def forget(self, memory: KVCache, start: Tensor) -> KVCache:
        if not memory.layers:
            return replace(memory, start=start)
        plain = self.keep.forget(self.opened(memory, _wide(memory.layers[0][0])), start)
        return self._packed(plain, memory.layers[0][0].dtype) if plain.layers else replace(plain, keep=self)

    def exact(self, memory: KVCache) -> int:
        """Number of slots that are stored as they are."""
        return min(memory.positions.shape[-1], self.pinned + memory.chunk)

    def _packed(self, plain: KVCache, dtype: torch.dtype) -> KVCache:
        """`exact` slots as they are: the sink and the newest frames. The others as int8. `notes` are the order of the slots, then
        numbers and scales of keys and values of each layer, then the policy's own."""
        held, batch = plain.positions.shape[-1], len(plain.layers[0][0])
        age = plain.positions.masked_fill(
            (plain.positions >= 0) & (plain.positions < self.pinned), torch.iinfo(torch.long).max
        )
        order_BS = age.expand(batch, -1).argsort(dim=-1, descending=True, stable=True)
        as_they_are, others = order_BS.split([self.exact(plain), held - self.exact(plain)], 1)
        layers, notes = [], [order_BS]
        for k, v in plain.layers:
            layers.append((frames_of(k, as_they_are, held).to(dtype), frames_of(v, as_they_are, held).to(dtype)))
            if others.shape[1]:
                shape = (others.shape[1], -1)
                notes += quantised(frames_of(k, others, held).unflatten(2, shape), dim=3)
                notes += quantised(frames_of(v, others, held).unflatten(2, shape), dim=4)
        return replace(plain, keep=self, layers=tuple(layers), notes=(*notes, *plain.notes))

    def opened(self, memory: KVCache, dtype: torch.dtype) -> KVCache:
        """The memory as its policy has it, with keys and values of this type."""
        if not memory.layers:
            return replace(memory, keep=self.keep)
        held = memory.positions.shape[-1]
        back_BS, each = memory.notes[0].argsort(-1), 4 if held > self.exact(memory) else 0
        layers = []
        for index, (k, v) in enumerate(memory.layers):
            own = memory.notes[1 + each * index :][:each]
            whole_k = torch.cat([k.to(dtype), *_restored(own[:2], dtype)], 2)
            whole_v = torch.cat([v.to(dtype), *_restored(own[2:], dtype)], 2)
            layers.append((frames_of(whole_k, back_BS, held), frames_of(whole_v, back_BS, held)))
        return replace(memory, keep=self.keep, layers=tuple(layers), notes=memory.notes[1 + each * len(layers) :])


def _restored(pair: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [restored(pair[0], pair[1], dtype).flatten(2, 3)] if pair else []


def quantised(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Int8 numbers and their bfloat16 scales, one scale for all of `dim`."""
    largest = x.abs().amax(dim, keepdim=True)
    scale = (largest / 127).bfloat16()
    scale = torch.where(scale > 0, scale, 1)
    return (x / scale.to(x.dtype)).round().clamp(-127, 127).to(torch.int8), scale


def restored(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantised` stands for."""
    return (numbers.to(_wide(scale)) * scale.to(_wide(scale))).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The type of arithmetic: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
