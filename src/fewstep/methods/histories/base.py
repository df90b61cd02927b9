"""What a chunk reads of earlier chunks in training on stored clips, where all chunks are predicted in parallel.

A network reads whole clips in one call, or it will stream and each chunk may read earlier chunks only. Then there are two ways
to train all chunks at once: what is read has noise of its own (diffusion forcing), or none (teacher forcing). The third way,
reading what the student itself has made, needs no stored clips and is a rollout (`SelfForced`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Call, Cond, KVView, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import Contract, Kind, NoisePath, Prediction, Stream, TimeDensity
from fewstep.diffusion.prediction import Tangent
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import empty_memory, one_after_the_other


class History(ABC):
    """What the student's inputs are, chunk by chunk: their times, and what they read of each other. A frozen dataclass."""

    stream: Any = None
    """How the student will make clips chunk by chunk (`Stream`); None: it makes whole clips."""
    calls: ClassVar[int] = 1
    """Calls of the network for one prediction."""

    @abstractmethod
    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        """`network` as it reads the clips `x0` `[B, C, F, H, W]`: a call with `n B` samples reads them n times."""

    def times(self, density: TimeDensity, clips: Tensor, rng: Rng) -> Tensor:
        """Times of clips like `[B, C, F, H, W]`: one for each, `[B]`, or one for each chunk, on all its frames, `[B, F]`."""
        return self._on_frames(density.sample(len(clips), rng, frames=self._chunks(clips)), clips, rng, clean=0.0)

    def index(self, count: int, clips: Tensor, rng: Rng) -> Tensor:
        """Likewise a number below `count` that stands for a time; `count` itself for a chunk without noise."""
        chunks = self._chunks(clips)
        shape = (len(clips),) if chunks is None else (len(clips), chunks)
        return self._on_frames(rng.integers(shape, "index", count), clips, rng, clean=count)

    def _chunks(self, clips: Tensor) -> int | None:
        return None if self.stream is None else len(self.stream.lengths(clips.shape[2]))

    def _on_frames(self, drawn: Tensor, clips: Tensor, rng: Rng, clean: float) -> Tensor:
        if self.stream is None:
            return drawn
        lengths = torch.tensor(self.stream.lengths(clips.shape[2]), device=drawn.device)
        return self._mixed(drawn, rng, clean).repeat_interleave(lengths, 1)

    def _mixed(self, drawn: Tensor, rng: Rng, clean: float) -> Tensor:
        """What was drawn for chunks `[B, n]`, where some of them shall have no noise."""
        return drawn

    def contract(self, contract: Contract) -> Contract:
        """The same contract for a student that streams, if it does."""
        return contract if self.stream is None else replace(contract, stream=self.stream)


@dataclass(frozen=True, kw_only=True)
class WholeClip(History):
    """Every frame reads every other, and all have one time."""

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return network


@dataclass(frozen=True)
class ByChunk:
    """A denoiser whose calls are chunks that read earlier ones (a `Predictor`)."""

    network: Predictor
    stream: Stream
    clean: Tensor | None = None
    """Clips `[B, C, F, H, W]` that are read in place of what a call itself has; None: what a call has."""

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
        clean = _each(self.clean, len(x_t))
        nothing = self.network.recall(KVCache.empty(), clean, call)
        read = self.network(clean, clean.new_zeros(len(clean)), cond, replace(call, kv=nothing)).kv
        if read is None:
            raise ValueError(
                "this network gives no keys and values, so chunks cannot read clean clips; leave out its runner"
            )
        memory = KVCache(layers=read, positions=torch.arange(clean.shape[2]))
        return replace(call, kv=self.network.recall(memory, x_t, call))


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
        clean = _each(self.clean, len(x_t))
        for length in self.stream.lengths(x_t.shape[2]):
            own, told = slice(first, first + length), cond.during(first, length)
            memory = memory.facing(told.extra.get("pose"))
            here = replace(call, kv=self.network.recall(memory, x_t[:, :, own], call))
            made.append(self.network(x_t[:, :, own], t if t.ndim == 1 else t[:, own], told, here).raw)
            kept = self.network(clean[:, :, own], clean.new_zeros(len(clean)), told, here).kv
            if kept is None:
                raise ValueError("this network gives no keys and values to remember; leave out its runner")
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


def _each(clean: Tensor, samples: int) -> Tensor:
    """The clips that so many samples of a call read: those of the batch, in turns."""
    return clean.repeat(samples // len(clean), 1, 1, 1, 1)


def chunks_of(stream: Stream, frames: int) -> Causal:
    """What the chunks of whole clips read, as they do one after the other in a stream. ValueError where one call cannot be so."""
    if stream.commit == "nothing":
        raise ValueError("chunks of this stream read nothing of each other; train it with MovingBuffer")
    return one_after_the_other(stream, stream.lengths(frames))
