"""All chunks of a clip in one call of a denoiser, each as if it came after the earlier ones in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import KV, Call, Cond, KVView
from fewstep.core.call import Causal
from fewstep.diffusion import Kind, NoisePath, Prediction, Stream
from fewstep.diffusion.prediction import Tangent
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import one_after_the_other


@dataclass(frozen=True)
class ByChunk:
    """A denoiser whose calls are chunks that read earlier ones (a `Predictor`)."""

    network: Predictor
    stream: Stream
    clean: Tensor | None = None
    """Clips `[B, C, F, H, W]` that are read in place of what a call itself has; None: what a call has. A call with `n B` samples
    reads them n times. Calls with `constants` of one run read them through keys and values that are made once."""

    @property
    def path(self) -> NoisePath:
        return self.network.path

    @property
    def kind(self) -> Kind:
        return self.network.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return self.network(x_t, t, cond, self._reading(x_t, cond, call))

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = Call()) -> list[Tensor]:
        return self.network.features(x_t, t, cond, layers, self._reading(x_t, cond, call))

    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor, call: Call = Call()
    ) -> tuple[Prediction, Tangent]:
        return self.network.jvp(x_t, t, cond, dx, dt, self._reading(x_t, cond, call))

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.network.recall(memory, x_t, call)

    def _reading(self, x_t: Tensor, cond: Cond, call: Call) -> Call:
        """A call on `x_t` with its chunks, and with keys and values of the clean clips where they are read."""
        call = replace(call, causal=chunks_of(self.stream, x_t.shape[2]))
        if self.clean is None:
            return call
        clean = clips_of(self.clean, len(x_t))
        memory = call.constant("clean clips", lambda: self._remembered(clean, cond, call))
        return replace(call, kv=self.network.recall(memory, x_t, call))

    def _remembered(self, clean: Tensor, cond: Cond, call: Call) -> KVCache:
        """The memory of a stream that has made the clean clips."""
        nothing = replace(call, kv=self.network.recall(KVCache.empty(), clean, call))
        return KVCache(layers=keys_of(self.network, clean, cond, nothing), positions=torch.arange(clean.shape[2]))


def keys_of(network: Predictor, clean: Tensor, cond: Cond, call: Call) -> tuple[KV, ...]:
    """Keys and values of clean frames `[B, C, F, h, w]`, those of a call at time 0. ValueError if the network gives none."""
    read = network(clean, clean.new_zeros(len(clean)), cond, call).kv
    if read is None:
        raise ValueError("this network gives no keys and values of clean frames to read; leave out its runner")
    return read


def clips_of(clean: Tensor, samples: int) -> Tensor:
    """The clips that so many samples of a call read: those of the batch, in turns."""
    return clean.repeat(samples // len(clean), 1, 1, 1, 1)


def chunks_of(stream: Stream, frames: int) -> Causal:
    """What the chunks of whole clips read, as they do one after the other in a stream. ValueError where one call cannot be so."""
    if stream.commit == "nothing":
        raise ValueError("chunks of this stream read nothing of each other; train it with MovingBuffer")
    return one_after_the_other(stream, stream.lengths(frames))
