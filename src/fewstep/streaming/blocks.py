"""The autoregressive loop: a chunk is sampled with the memory of earlier chunks, then added to it. Training and serving
import it.

    1  view = what the memory holds, turned to where it stands                       once per chunk
    2  x = sampler from fresh noise over the student's times, every call reads view
    3  memory = memory and the keys and values of the chunk                           (`Stream.commit`)

With `Stream.recompute` line 3 only counts frames, and before line 1 the memory is made of the last latents (`Chunks.ready`).
Calls write nothing: a chunk that is given up half-way leaves the memory as it was. A training rollout may stop a chunk early,
at an exit; then the prediction of that step is the chunk, and the only one that carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.attention import Everything, Keep, KVCache, StateMemory, Window
from fewstep.core import KV, Call, Cond, KVView, Rng, Seeds
from fewstep.core.call import Causal, Constants, Runner, every_block
from fewstep.diffusion import Contract, NoisePath, Prediction, Step, StepCountError, Stream
from fewstep.diffusion.samplers import Denoise, Here, full
from fewstep.streaming.levels import joined, view_of


class Reader(Protocol):
    """A denoiser that reads a memory."""

    @property
    def path(self) -> NoisePath: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = ..., /) -> Prediction: ...

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = ..., /) -> KVView: ...


@dataclass(frozen=True, eq=False)
class Flying:
    """A chunk among several that are denoised at once (`streaming.rolling`)."""

    index: int
    """Its number in the stream."""
    x: Tensor
    """Its latents at its time, `[B, C, f, H, W]`."""
    step: int = 0
    """Number of steps that it has made."""
    before: Prediction | None = None
    """Prediction of its last step."""


@dataclass(frozen=True)
class Made:
    """A step of a chunk that has been made."""

    step: Step
    commit: Callable[[], KVCache] | None = None
    """Adds the chunk to the memory, once (`functools.cache`); None before its last step."""
    window: tuple[Flying, ...] = ()
    """Chunks that were denoised with it and are not finished, oldest first; before its last step it is one of them."""

    @property
    def memory(self) -> KVCache | None:
        """Memory after the chunk, made when first asked for, so that a chunk can be shown before; None before its last step."""
        return None if self.commit is None else self.commit()

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """Those of all chunks of the call, oldest first."""
        others = tuple(flying.before for flying in self.window if flying.before is not None)
        return others if self.window and self.commit is None else (self.step.prediction, *others)

    @property
    def x(self) -> Tensor:
        """The chunk, `[B, C, f, H, W]`, after its last step."""
        return self.step.x if self.step.index == self.step.steps - 1 else self.step.prediction.x0


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How one student makes chunks: the whole of what training and serving must agree on."""

    network: Reader
    contract: Contract
    times: tuple[float, ...]
    """Times of the sampler's steps, the same in every chunk, unless the stream has `steps` of its own."""
    constants: Constants | None = None
    """What all calls of one stream share while its conditions stay, such as keys of the text; None: it is computed every time."""

    @classmethod
    def of(cls, network: Reader, contract: Contract, steps: int | None = None, *, force: bool = False) -> Chunks:
        """Those of a contract. StepCountError for a step count that it was not trained for, unless `force`. The contract's own
        number means its stream's, where that has them chunk by chunk."""
        own = () if contract.stream is None else contract.stream.steps
        if own and steps not in (None, contract.steps):
            if not force:
                raise StepCountError(
                    f"the chunks of this stream take {', '.join(map(str, own))} steps; leave the step count out, not {steps}"
                )
            return cls(network=network, contract=contract, times=()).at(contract.times(steps, force=force))
        return cls(network=network, contract=contract, times=contract.times(steps, force=force))

    @property
    def stream(self) -> Stream:
        """ValueError where the contract has none."""
        if self.contract.stream is None:
            raise ValueError("this model makes whole clips; a student that streams has `stream` in its contract")
        return self.contract.stream

    def begin(self) -> KVCache:
        """The memory of a stream that has not begun."""
        return empty_memory(self.stream)

    def grid(self, index: int) -> tuple[float, ...]:
        """Times of the steps of chunk `index`."""
        own = self.stream.steps
        return self.contract.times(own[min(index, len(own) - 1)]) if own else self.times

    def at(self, times: tuple[float, ...]) -> Chunks:
        """The same with these times in every chunk."""
        stream = replace(self.stream, steps=())
        return replace(self, contract=replace(self.contract, stream=stream), times=times)

    def chunk(
        self,
        memory: KVCache,
        noise: Tensor,
        cond: Cond,
        uncond: Cond,
        rng: Seeds | Rng,
        *,
        runner: Runner = every_block,
        exit: int | None = None,
    ) -> Iterator[Made]:
        """Make the chunk that follows `memory` from `noise` `[B, C, f, H, W]`, step by step; the last step has its memory.

        `rng` is this chunk's own. With guidance the memory is of twice as many samples, the condition's first. `exit` is for
        training: the step to stop at, and the only one with gradient. What is remembered has none.
        """
        memory, levels, kept = memory.facing(self._poses(cond)), self.stream.commit == "levels", list[Any]()
        view = self.network.recall(memory, noise)  # 1
        if levels and exit not in (None, len(self.times) - 2):
            raise ValueError("a stream that remembers every step makes them all; let the rollout have exit: last")

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            past = view_of(view, call.step, call.steps) if levels else view
            return self._reading(past, cond, uncond)(x_t, t, call)

        def cached(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            with nullcontext() if exit in (None, call.step) else torch.no_grad():
                return denoise(x_t, t, replace(call, runner=runner))

        for step in self.contract.sampler.sampling(cached, noise, self._grid(memory), rng=rng):  # 2
            made = Made(step)
            kept = [*kept, step.prediction.kv] if levels else [step.prediction.kv]
            ends = step.index == (step.steps - 1 if exit is None else exit)
            if ends:
                commit = self._committed if exit is None else torch.no_grad()(self._committed)
                made = replace(made, commit=cache(partial(commit, memory, made, joined(kept), denoise, rng)))
            yield made
            if ends:
                return

    def known(
        self, memory: KVCache, x: Tensor, cond: Cond, uncond: Cond, rng: Seeds | Rng, index: int
    ) -> Iterator[Made]:
        """Chunk `index`, which follows `memory`, where its latents `x` are known, such as those of an image: the one call that
        remembers it, as if it were finished."""
        memory, steps = memory.facing(self._poses(cond)), len(self.grid(index)) - 1
        view, levels = self.network.recall(memory, x), steps if self.stream.commit == "levels" else 1
        reads = [self._reading(view_of(view, level, levels), cond, uncond) for level in range(levels)]
        calls = [Call(step=step, steps=steps) for step in range(steps - levels, steps)]
        every = [self._context(x, denoise, call, rng) for denoise, call in zip(reads, calls, strict=True)]
        commit = partial(self._after, memory, joined([p.kv for p in every]), x.shape[2])
        yield Made(Step(0, 1, every[-1], x), cache(commit))

    def hop(
        self, memory: KVCache, x: Tensor, level: int, cond: Cond, uncond: Cond, rng: Seeds | Rng, *, known: bool = False
    ) -> tuple[Tensor, tuple[KV, ...]]:
        """A chunk `x` after step `level`, and what is remembered of that step, which reads `memory`, its own
        (`streaming.pipelined`). A chunk that is `known` is only remembered."""
        call = Call(step=level, steps=len(self.times) - 1)
        denoise = self._reading(self.network.recall(memory.facing(self._poses(cond)), x), cond, uncond)
        if known:
            return x, _given(self._context(x, denoise, call, rng).kv)
        t, s = self.times[level : level + 2]
        prediction = denoise(x, full(t, x), call)
        here = Here(x, t, s, prediction, None, call, denoise, rng)
        return here.kept(self.contract.sampler.move(here)), _given(prediction.kv)

    def _reading(self, view: KVView, cond: Cond, uncond: Cond) -> Denoise:
        """What the network predicts when it reads this past."""

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            call = replace(call, kv=view, constants=self.constants)
            return self.contract.guidance(self.network, x_t, t, cond, uncond, call)

        return denoise

    @torch.no_grad()
    def given(self, memory: KVCache, x: Tensor, cond: Cond, rng: Seeds | Rng, index: int) -> KVCache:
        """`memory` and the `known` chunk `index`, without gradient."""
        (made,) = self.known(memory, x, cond, cond, rng, index)
        assert made.memory is not None
        return made.memory

    def _poses(self, cond: Cond) -> Tensor | None:
        """Where the frames of the next chunk look from, if the condition says it."""
        pose = cond.extra.get("pose")
        return pose if pose is None or not self.contract.guidance.active else torch.cat([pose, pose])

    def require_recache(self) -> None:
        """ValueError for a stream whose memory latents alone do not tell."""
        if self.stream.commit == "nothing":
            raise ValueError("this stream remembers nothing, so there is nothing to make anew; choose keep or lerp")
        if self.stream.recompute:
            raise ValueError("this stream makes its memory anew before every chunk, with the new prompts; choose keep")
        if self.stream.commit in ("last", "levels"):
            raise ValueError(
                "this stream remembers what its steps made, which latents alone do not tell; choose another switch than "
                "recache, or a stream that commits clean latents"
            )

    def recache(
        self, memory: KVCache, latents: Tensor, cond: Cond, uncond: Cond, rng: Seeds | Rng, *, sink: bool = True
    ) -> KVCache:
        """The memory made anew from the last latents `[B, C, F, h, w]` that it holds, with other conditions: one call per chunk.

        It is the memory of a stream that begins with these latents, and not what was carried on: a call reads a past that read
        its own past in turn. A sink that is older than the latents stays as it is; without `sink` it is forgotten.
        """
        self.require_recache()
        return self._anew(memory, latents, cond, uncond, rng, sink)

    @torch.no_grad()
    def ready(
        self,
        memory: KVCache,
        latents: Tensor | None,
        cond: Cond,
        uncond: Cond,
        rng: Seeds | Rng,
        *,
        image: Tensor | None = None,
    ) -> KVCache:
        """What the next chunk is given as its memory: `memory`, and with `Stream.recompute` the one made anew from `latents`,
        those that `recent` keeps, with the conditions of that chunk. `rng` is that of the stream. It carries no gradient.
        `image` `[B, C, 1, h, w]` takes the place of their first frame with `Stream.reencode`, unless that is the stream's.

        Made with the same conditions and before the window is full, it is the memory that is carried on, bit for bit. ValueError
        for conditions that differ from frame to frame: those of earlier frames are not known.
        """
        if not self.stream.recompute or latents is None:
            return memory
        if cond.framewise:
            raise ValueError(
                f"this model reads {', '.join(sorted(cond.framewise))} of every frame, which a memory that is made anew is not "
                "told; let the stream have recompute: false"
            )
        if self.stream.reencode and int(memory.start) > latents.shape[2]:
            if image is None:
                raise ValueError(
                    "this stream encodes the first latent of its past again as an image, and a rollout has no autoencoder; train "
                    "with reencode: false, and set it in the student's card"
                )
            latents = torch.cat([image, latents[:, :, 1:]], 2)
        return self._anew(memory, latents, cond, uncond, rng, False)

    def _anew(
        self, memory: KVCache, latents: Tensor, cond: Cond, uncond: Cond, rng: Seeds | Rng, sink: bool
    ) -> KVCache:
        """`recache`, in any stream."""
        if memory.start.ndim:
            raise ValueError(
                "streams of different age are not made anew in one call; do it for each before they are one batch"
            )
        first = memory.start - latents.shape[2]
        index, lengths = self.stream.index(int(first)), list[int]()
        while sum(lengths) < latents.shape[2]:
            lengths.append(self.stream.length(index + len(lengths)))
        stays = sink and int(first) >= memory.keep.pinned
        memory = memory.keep.forget(memory, first) if stays else replace(self.begin(), start=first)
        for number, x in enumerate(latents.split(lengths, 2), index):
            steps = len(self.grid(number)) - 1
            reading = self._reading(self.network.recall(memory, x), cond, uncond)
            call = Call(step=steps - 1, steps=steps)
            kept = self._context(x, reading, call, rng.fold(f"chunk/{number}"))
            memory = memory.commit(_given(kept.kv), x.shape[2])
        return memory

    def recent(self, latents: Tensor | None, x: Tensor, index: int) -> Tensor:
        """The latents from which the memory can be made anew after chunk `index`, which is `x`: as many of the last chunks as a
        chunk may read, at least one. With `Stream.recompute` its own frames count, too."""
        if self.stream.commit == "nothing":
            return x
        span, frames = keep_of(self.stream).span, x.shape[2]
        if span is not None and self.stream.recompute:
            span -= max(self.stream.chunks)
        while (span is None and index) or (
            span is not None and index and frames + self.stream.length(index - 1) <= span
        ):
            index, frames = index - 1, frames + self.stream.length(index - 1)
        return x if latents is None else torch.cat([latents, x], 2)[:, :, -frames:]

    def _grid(self, memory: KVCache) -> tuple[float, ...]:
        """Times of the chunk that follows `memory`."""
        if not self.stream.steps:
            return self.times
        grids = {self.grid(self.stream.index(start)) for start in memory.start.flatten().tolist()}
        if len(grids) > 1:
            raise ValueError("streams of one batch have chunks of different numbers of steps; keep them apart")
        return grids.pop()

    def _committed(
        self, memory: KVCache, made: Made, kv: tuple[KV, ...] | None, denoise: Denoise, rng: Seeds | Rng
    ) -> KVCache:
        call = Call(step=made.step.index, steps=made.step.steps)
        return self.remembered(memory, made.x, kv, denoise, call, rng)

    def remembered(
        self, memory: KVCache, x: Tensor, kv: tuple[KV, ...] | None, denoise: Denoise, call: Call, rng: Seeds | Rng
    ) -> KVCache:
        """`memory` and a finished chunk `x`, whose last step was `call` and made `kv`."""
        if self.stream.commits and not self.stream.recompute:
            kv = self._context(x, denoise, call, rng).kv
        return self._after(memory, kv, x.shape[2])

    def _after(self, memory: KVCache, kv: tuple[KV, ...] | None, frames: int) -> KVCache:
        """`memory` after a finished chunk, with what it leaves."""
        if self.stream.commit == "nothing" or self.stream.recompute:
            return replace(self.begin(), start=memory.start + frames)
        return memory.commit(_given(kv), frames)  # 3

    def _context(self, x: Tensor, denoise: Denoise, call: Call, rng: Seeds | Rng) -> Prediction:
        """The call on finished latents whose keys and values are remembered."""
        t = self.stream.context_time
        x_t = self.network.path.add_noise(x, rng.randn(x.shape, "context"), full(t, x)) if t else x
        return denoise(x_t, full(t, x), call)


def _given(kv: tuple[KV, ...] | None) -> tuple[KV, ...]:
    """Keys and values to remember, without gradient where none is taken. ValueError where blocks were left out."""
    if kv is None:
        raise ValueError(
            "the last step of this chunk skipped blocks, so there is nothing to commit; let the stream commit clean "
            "latents, or choose a cache policy that runs every block in the last step"
        )
    return kv if torch.is_grad_enabled() else tuple((k.detach(), v.detach()) for k, v in kv)


def empty_memory(stream: Stream) -> KVCache:
    """The memory of a stream that has not begun."""
    standing = "window" if stream.commit == "nothing" else stream.positions
    return KVCache.empty(keep_of(stream), max(stream.chunks), standing, stream.past_weight)


def keep_of(stream: Stream) -> Keep:
    """What the memory of a stream holds. ValueError for a policy that is none of `attention.kv`."""
    if stream.memory is None:
        return Window(window=stream.window, sink=stream.sink) if stream.window else Everything()
    if not isinstance(stream.memory, Keep):
        raise ValueError(
            f"memory: {type(stream.memory).__name__} is no policy of fewstep.attention.kv; derive it from Keep"
        )
    return stream.memory


def one_after_the_other(stream: Stream, lengths: tuple[int, ...]) -> Causal:
    """What chunks of so many frames read if they are one call: each what it reads in a stream, where the ones before it have been
    made. ValueError where one call cannot be so."""
    if stream.positions != "absolute":
        raise ValueError(
            f"in one call of several chunks a frame has one position, and this stream has positions {stream.positions!r}; take "
            "absolute ones, or make one chunk after the other (in training: SelfForced)"
        )
    if stream.recompute:
        raise ValueError(
            "in one call of several chunks each reads what the others had read, and this stream makes its memory anew; let it "
            "have recompute: false, or make one chunk after the other (in training: SelfForced)"
        )
    if stream.past_weight != 1:
        raise ValueError(
            "in one call of several chunks all that is read counts alike; let the stream have past_weight: 1, or make one chunk "
            "after the other (in training: SelfForced)"
        )
    keep = keep_of(stream)
    if isinstance(keep, Window | StateMemory):
        return Causal(lengths, keep.window - keep.sink - max(stream.chunks), keep.sink)
    if not isinstance(keep, Everything):
        raise ValueError(
            f"in one call of several chunks each reads everything or a window, and this stream remembers by "
            f"{type(keep).__name__}; give it a window, or make one chunk after the other (in training: SelfForced, or "
            "TeacherForced with apart: true)"
        )
    return Causal(lengths)
