"""The autoregressive loop: a chunk is sampled with the memory of earlier chunks, then added to it. Training and serving
import it.

    1  view = what the memory holds, turned to where it stands                       once per chunk
    2  x = sampler from fresh noise over the student's times, every call reads view
    3  memory = memory and the keys and values of the chunk                           (`Stream.commit`)

Calls write nothing: a chunk that is given up half-way leaves the memory as it was. A training rollout may stop a chunk early,
at an exit; then the prediction of that step is the chunk, and the only one that carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from fewstep.attention import Everything, Keep, KVCache, Window
from fewstep.core import Call, Cond, KVView, Rng, Seeds
from fewstep.core.call import Constants, Runner, every_block
from fewstep.diffusion import Contract, NoisePath, Prediction, Step, Stream
from fewstep.diffusion.samplers import Denoise, full


class Reader(Protocol):
    """A denoiser that reads a memory."""

    path: NoisePath

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = ..., /) -> Prediction: ...

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = ..., /) -> KVView: ...


@dataclass(frozen=True)
class Made:
    """A step of a chunk that has been made."""

    step: Step
    commit: Callable[[], KVCache] | None = None
    """Adds the chunk to the memory; None before its last step."""

    @cached_property
    def memory(self) -> KVCache | None:
        """Memory after the chunk, made when it is first asked for, so that a chunk can be shown before; None before its last
        step."""
        return None if self.commit is None else self.commit()

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
    """Times of the sampler's steps, the same in every chunk."""
    constants: Constants | None = None
    """What all calls of one stream share while its conditions stay, such as keys of the text; None: it is computed every time."""

    @property
    def stream(self) -> Stream:
        """ValueError where the contract has none."""
        if self.contract.stream is None:
            raise ValueError("this model makes whole clips; a student that streams has `stream` in its contract")
        return self.contract.stream

    def begin(self) -> KVCache:
        """The memory of a stream that has not begun."""
        return KVCache.empty(keep_of(self.stream))

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
        view = self.network.recall(memory, noise)  # 1

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            return self.contract.guidance(
                self.network, x_t, t, cond, uncond, replace(call, kv=view, constants=self.constants)
            )

        def cached(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            with nullcontext() if exit in (None, call.step) else torch.no_grad():
                return denoise(x_t, t, replace(call, runner=runner))

        for step in self.contract.sampler.sampling(cached, noise, self.times, rng=rng):  # 2
            made = Made(step)
            ends = step.index == (step.steps - 1 if exit is None else exit)
            if ends:
                commit = self._committed if exit is None else torch.no_grad()(self._committed)
                made = replace(made, commit=partial(commit, memory, made, denoise, rng))
            yield made
            if ends:
                return

    def _committed(self, memory: KVCache, made: Made, denoise: Denoise, rng: Seeds | Rng) -> KVCache:
        last, x, kv = made.step, made.x, made.step.prediction.kv
        if self.stream.commit != "last":
            t = self.stream.context_time
            x_t = self.network.path.add_noise(x, rng.randn(x.shape, "context"), full(t, x)) if t else x
            kv = denoise(x_t, full(t, x), Call(step=last.index, steps=last.steps)).kv
        if kv is None:
            raise ValueError(
                "the last step of this chunk skipped blocks, so there is nothing to commit; let the stream commit clean "
                "latents, or choose a cache policy that runs every block in the last step"
            )
        if not torch.is_grad_enabled():
            kv = tuple((k.detach(), v.detach()) for k, v in kv)
        return memory.commit(kv, x.shape[2])  # 3


def keep_of(stream: Stream) -> Keep:
    """What the memory of a stream holds."""
    if not stream.window:
        return Everything()
    return Window(
        window=stream.window, chunk=max(stream.chunks), sink=stream.sink, relative=stream.positions == "window"
    )
