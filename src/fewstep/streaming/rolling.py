"""A rolling window (Rolling Forcing, 2509.25161): a call denoises several chunks at rising noise, and later ones correct others.

    1  push a chunk of noise; the window is then, oldest first, at times t_T < ... < t_1
    2  x0 = network of the whole window, each frame at its own time, reads the memory              one call per tick
    3  every chunk moves to its next time
    4  the oldest, now at time 0, is finished: it leaves the window and is remembered               (`Stream.commit`)

At the beginning the window grows by a chunk per tick, so the first chunk is finished after T ticks; at the end it shrinks. Unlike
the paper's, this window does not remember an estimate of the first chunk while that is still in it. With one step it is the
ordinary loop, bit for bit. The network must read both directions of time in a window: the pattern `Dense`, as for a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import KV, Call, Cond, Rng, Seeds
from fewstep.diffusion import Prediction
from fewstep.diffusion.samplers import Here, full
from fewstep.streaming.blocks import Chunks


@dataclass(frozen=True, eq=False)
class Flying:
    """A chunk in the window."""

    index: int
    """Its number in the stream."""
    x: Tensor
    """Its latents at its time, `[B, C, f, H, W]`."""
    step: int = 0
    """Number of steps that it has made."""
    before: Prediction | None = None
    """Prediction of its last step."""


@dataclass(frozen=True, eq=False)
class Tick:
    """The window after a call."""

    memory: KVCache
    window: tuple[Flying, ...] = ()
    """Chunks that are not finished, oldest first."""
    pushed: int = 0
    """Number of chunks that have entered the window."""
    done: Tensor | None = None
    """The chunk that this call finished, if any."""


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """How one student makes chunks in a rolling window. ValueError for a sampler that takes several calls per step, and for a
    stream whose chunks differ in steps."""

    chunks: Chunks

    def __post_init__(self) -> None:
        loop = self.chunks
        if loop.stream.steps:
            raise ValueError(
                f"chunks of one window take one number of steps, and those of this stream take {loop.stream.steps}; leave "
                "stream.steps out"
            )
        sampler, steps = loop.contract.sampler, len(loop.times) - 1
        if sampler.calls(steps) != steps:
            raise ValueError(
                f"{type(sampler).__name__} takes {sampler.calls(steps)} calls for {steps} steps, and a window has one call per "
                "step; choose a sampler like Renoise or Euler"
            )

    def begin(self) -> Tick:
        """The window of a stream that has not begun."""
        return Tick(self.chunks.begin())

    def take(
        self, count: int, shape: tuple[int, int, int], cond: Cond, uncond: Cond, rng: Seeds | Rng
    ) -> Iterator[Tensor]:
        """A clip of so many chunks, latents `[B, C, f, H, W]` each, as soon as they are finished. `shape` is `(C, H, W)`."""
        tick, (channels, *size) = self.begin(), shape
        while tick.pushed < count or tick.window:
            noise = None
            if tick.pushed < count:
                length = self.chunks.stream.length(tick.pushed)
                noise = rng.fold(f"chunk/{tick.pushed}").randn((len(cond), channels, length, *size), "start")
                noise = self.chunks.network.path.prior(noise)
            tick = self.tick(tick, noise, cond, uncond, rng)
            if tick.done is not None:
                yield tick.done

    def tick(self, tick: Tick, noise: Tensor | None, cond: Cond, uncond: Cond, rng: Seeds | Rng) -> Tick:
        """The window after one more call. `noise` is the chunk to push; None: the stream ends and the window shrinks. `rng` is
        that of the stream: chunk n has `rng.fold("chunk/n")`, as in a session."""
        loop, times, window = self.chunks, self.chunks.times, tick.window
        if noise is not None:
            window = (*window, Flying(tick.pushed, noise))  # 1
        if not window:
            raise ValueError("nothing is in the window, and nothing was pushed; give noise")
        x, steps = torch.cat([flying.x for flying in window], 2), len(times) - 1
        each = [times[flying.step] for flying in window for _ in range(flying.x.shape[2])]
        t = full(each[0] if len(set(each)) == 1 else tuple(each), x)
        view = loop.network.recall(tick.memory, window[0].x)

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            return loop.contract.guidance(loop.network, x_t, t, cond, uncond, replace(call, kv=view))

        made = denoise(x, t, Call(step=window[0].step, steps=steps))  # 2
        moved = tuple(self._moved(window, made, rng))  # 3
        pushed, (oldest, *others) = tick.pushed + (noise is not None), moved
        if oldest.step < steps:
            return Tick(tick.memory, moved, pushed)
        own = rng.fold(f"chunk/{oldest.index}")
        kv = _first(made.kv, oldest.x.shape[2], x.shape[2])
        memory = loop.remembered(tick.memory, oldest.x, kv, denoise, Call(step=steps - 1, steps=steps), own)
        return Tick(memory, tuple(others), pushed, oldest.x)  # 4

    def _moved(self, window: Sequence[Flying], made: Prediction, rng: Seeds | Rng) -> Iterator[Flying]:
        """Every chunk after its next step."""
        times, begin = self.chunks.times, 0
        for flying in window:
            end, step = begin + flying.x.shape[2], flying.step
            call, own = Call(step=step, steps=len(times) - 1), rng.fold(f"chunk/{flying.index}")
            t = full(times[step], flying.x)
            prediction = Prediction(made.raw[:, :, begin:end], made.kind, flying.x, t, made.path)
            here = Here(flying.x, times[step], times[step + 1], prediction, flying.before, call, _once, own)
            x = here.kept(self.chunks.contract.sampler.move(here))
            yield Flying(flying.index, x, step + 1, prediction)
            begin = end


def _once(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
    raise ValueError(
        "a window has one call per step, and this sampler asks for another one; choose one like Renoise or Euler"
    )


def _first(kv: tuple[KV, ...] | None, frames: int, of: int) -> tuple[KV, ...] | None:
    """Keys and values of the first frames of a call."""
    if kv is None:
        return None
    return tuple((k[:, :, : k.shape[2] // of * frames], v[:, :, : v.shape[2] // of * frames]) for k, v in kv)
