"""One chunk after the other in calls of their own, for memories that a single call cannot stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Call, Cond, KVView
from fewstep.diffusion import Kind, NoisePath, Prediction, Stream
from fewstep.diffusion.prediction import Tangent
from fewstep.models.by_chunk import clips_of, keys_of
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import empty_memory


@dataclass(frozen=True)
class OneByOne:
    """A denoiser that makes one chunk after the other, each with the memory of a stream of clean ones (a `Predictor`). Gradient
    flows through what is remembered."""

    network: Predictor
    stream: Stream
    clean: Tensor
    """Clips `[B, C, F, H, W]` that are remembered."""

    @property
    def path(self) -> NoisePath:
        return self.network.path

    @property
    def kind(self) -> Kind:
        return self.network.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        memory, first, made = empty_memory(self.stream), 0, list[Tensor]()
        clean = clips_of(self.clean, len(x_t))
        for length in self.stream.lengths(x_t.shape[2]):
            own, told = slice(first, first + length), cond.during(first, length)
            memory = memory.facing(told.extra.get("pose"))
            here = replace(call, kv=self.network.recall(memory, x_t[:, :, own], call))
            made.append(self.network(x_t[:, :, own], t if t.ndim == 1 else t[:, own], told, here).raw)
            kept = keys_of(self.network, clean[:, :, own], told, here)
            memory, first = memory.commit(kept, length), first + length
        return Prediction(torch.cat(made, 2), self.kind, x_t, t, self.path)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = Call()) -> list[Tensor]:
        raise ValueError("chunks that are calls of their own have no features of a clip; write apart: false")

    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor, call: Call = Call()
    ) -> tuple[Prediction, Tangent]:
        raise ValueError("chunks that are calls of their own have no derivative in one pass; write apart: false")

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.network.recall(memory, x_t, call)
