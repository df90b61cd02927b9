"""The autoregressive loop: a chunk is sampled with the memory of earlier chunks, then added to it. Training and serving
import it.

    1  view = what the memory holds, turned to where it stands                       once per chunk
    2  x = sampler from fresh noise over the student's times, every call reads view
    3  memory = memory and the keys and values of the chunk                           (`Stream.commit`)

Calls write nothing: a chunk that is given up half-way leaves the memory as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.attention import Everything, Keep, KVCache, Window
from fewstep.core import Call, Cond, Rng, Seeds
from fewstep.core.call import Runner, every_block
from fewstep.diffusion import Contract, Prediction, Step, Stream
from fewstep.diffusion.samplers import Denoise, full
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True)
class Made:
    """A step of a chunk that has been made."""

    step: Step
    memory: KVCache | None
    """Memory after the chunk; None before its last step."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How one student makes chunks: the whole of what training and serving must agree on."""

    network: Predictor
    contract: Contract
    times: tuple[float, ...]
    """Times of the sampler's steps, the same in every chunk."""

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
        self, memory: KVCache, noise: Tensor, cond: Cond, uncond: Cond, rng: Seeds | Rng, runner: Runner = every_block
    ) -> Iterator[Made]:
        """Make the chunk that follows `memory` from `noise` `[B, C, f, H, W]`, step by step; the last step has its memory.

        `rng` is this chunk's own. With guidance the memory is of twice as many samples, the condition's first.
        """
        view = self.network.recall(memory, noise)  # 1

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            return self.contract.guidance(self.network, x_t, t, cond, uncond, replace(call, kv=view))

        def cached(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            return denoise(x_t, t, replace(call, runner=runner))

        for step in self.contract.sampler.sampling(cached, noise, self.times, rng=rng):  # 2
            ends = step.index == step.steps - 1
            yield Made(step, self._committed(memory, step, denoise, rng) if ends else None)

    def _committed(self, memory: KVCache, last: Step, denoise: Denoise, rng: Seeds | Rng) -> KVCache:
        x, kv = last.x, last.prediction.kv
        if self.stream.commit != "last":
            t = self.stream.context_time
            x_t = self.network.path.add_noise(x, rng.randn(x.shape, "context"), full(t, x)) if t else x
            kv = denoise(x_t, full(t, x), Call(step=last.index, steps=last.steps)).kv
        if kv is None:
            raise ValueError(
                "the last step of this chunk skipped blocks, so there is nothing to commit; let the stream commit clean "
                "latents, or choose a cache policy that runs every block in the last step"
            )
        return memory.commit(kv, x.shape[2])  # 3


def keep_of(stream: Stream) -> Keep:
    """What the memory of a stream holds."""
    if not stream.window:
        return Everything()
    return Window(
        window=stream.window, chunk=max(stream.chunks), sink=stream.sink, relative=stream.positions == "window"
    )
