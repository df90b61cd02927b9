"""A rolling window (Rolling Forcing, 2509.25161): a call denoises several chunks at rising noise, and later ones correct others.

    1  push a chunk of noise, once the newest chunk has made T / N of its T steps: N chunks are in the window then
    2  x0 = network of the whole window, each frame at its own time, reads the memory              one call per tick
    3  every chunk moves to its next time
    4  the oldest, once at time 0, is finished: it leaves the window and is remembered              (`Stream.commit`)

At the beginning the window grows, so the first chunk is finished after T ticks; where the stream ends it shrinks. With N = T, as
in Rolling Forcing, each tick finishes a chunk; with fewer chunks each makes several steps before the next one is pushed
(StreamDiT, 2507.03745). With one chunk it is the ordinary loop, bit for bit. A call reads `Stream.window` frames in all: the
sink, its own, and the newest of the others; while the window shrinks, it reads more of the past. The network must read both
directions of time in a window: the pattern `Dense`, as for a chunk.

Without `Stream.mutual` a chunk of the window reads earlier ones alone, and each chunk as many frames as it would one after the
other. This is Block Cascading (2511.20426), for students that were not trained to roll: a chunk starts when the one before it has
made T / N of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from fewstep.attention import Everything, KVCache, Window
from fewstep.core import KV, Call, Cond, Rng, Seeds
from fewstep.diffusion import Prediction, Step
from fewstep.diffusion.samplers import Denoise, Here, full
from fewstep.streaming.blocks import Chunks, Flying, Made, keep_of, one_after_the_other
from fewstep.streaming.noise import start_noise


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """How one student makes chunks in a window of `Stream.rolling` chunks.

    ValueError for a sampler that takes several calls per step, for a stream whose chunks differ in steps or whose memory is not
    all frames or a window, and for a number of steps that the chunks of the window cannot share.
    """

    chunks: Chunks

    def __post_init__(self) -> None:
        loop, stream, steps = self.chunks, self.chunks.stream, len(self.chunks.times) - 1
        if stream.steps:
            raise ValueError(
                f"chunks of one window take one number of steps, and those of this stream take {stream.steps}; leave "
                "stream.steps out"
            )
        sampler = loop.contract.sampler
        if sampler.calls(steps) != steps:
            raise ValueError(
                f"{type(sampler).__name__} takes {sampler.calls(steps)} calls for {steps} steps, and a window has one call per "
                "step; choose a sampler like Renoise or Euler"
            )
        if steps % self.width:
            raise ValueError(
                f"{steps} steps cannot be shared by the {self.width} chunks of a rolling window; take a multiple of "
                f"{self.width}"
            )
        if not stream.mutual:
            one_after_the_other(stream, stream.chunks)  # ValueError for positions that one call cannot have
        if not isinstance(keep_of(stream), Everything | Window):
            raise ValueError(
                f"a rolling window reads everything or a window of the past, and this stream remembers by "
                f"{type(keep_of(stream)).__name__}; leave stream.memory out, or name Window"
            )

    @property
    def width(self) -> int:
        """Number of chunks in a full window."""
        return max(self.chunks.stream.rolling, 1)

    @property
    def turns(self) -> int:
        """Steps that a chunk makes before the next one is pushed."""
        return (len(self.chunks.times) - 1) // self.width

    def count(self, index: int) -> int:
        """Number of ticks from one finished chunk to the next, which is chunk `index`."""
        return self.turns if index else self.turns * self.width

    def chunk(
        self,
        memory: KVCache,
        window: tuple[Flying, ...],
        start: Callable[[int], Tensor | None],
        cond: Cond,
        uncond: Cond,
        rng: Seeds | Rng,
    ) -> Iterator[Made]:
        """The ticks after which the oldest chunk of `window` is finished, or where that is empty, the chunk that `memory` ends
        at. The last tick has its memory, and the window that stays.

        `start(n)` is chunk n at time 1, `[B, C, f, H, W]`; None: the stream has ended before. `rng` is that of the stream: chunk
        n has `rng.fold("chunk/n")`, as in a session.
        """
        steps = len(self.chunks.times) - 1 - (window[0].step if window else 0)
        for number in range(steps):
            made = self.tick(memory, self.pushed(memory, window, start), cond, uncond, rng)
            window = made.window
            yield replace(made, step=replace(made.step, index=number, steps=steps))

    def pushed(
        self, memory: KVCache, window: tuple[Flying, ...], start: Callable[[int], Tensor | None]
    ) -> tuple[Flying, ...]:
        """`window` before its next call: with another chunk, if it is time and `start` gives one."""
        if window and window[-1].step < self.turns:
            return window
        index = window[-1].index + 1 if window else self.chunks.stream.index(int(memory.start))
        noise = start(index)
        return window if noise is None else (*window, Flying(index, noise))

    def take(
        self, count: int, shape: tuple[int, int, int], cond: Cond, uncond: Cond, rng: Seeds | Rng
    ) -> Iterator[Tensor]:
        """A clip of so many chunks, latents `[B, C, f, H, W]` each, as soon as they are finished. `shape` is `(C, H, W)`."""
        memory, window = self.chunks.begin(), tuple[Flying, ...]()
        start = partial(self.start, size=(len(cond), *shape), rng=rng, count=count)
        for _ in range(count):
            *_, made = self.chunk(memory, window, start, cond, uncond, rng)
            yield made.x
            memory, window = made.memory or memory, made.window

    def start(
        self, index: int, *, size: tuple[int, int, int, int], rng: Seeds | Rng, count: int | None
    ) -> Tensor | None:
        """Chunk `index` at time 1, from noise; None after `count` chunks, if there is an end. `size` is `(B, C, H, W)`."""
        if count is not None and index >= count:
            return None
        return self.chunks.network.path.prior(start_noise(self.chunks.stream, index, size, rng))

    def tick(self, memory: KVCache, window: tuple[Flying, ...], cond: Cond, uncond: Cond, rng: Seeds | Rng) -> Made:
        """One call on `window`, oldest chunk first. ValueError where it is empty."""
        if not window:
            raise ValueError("nothing is in the window, and nothing was pushed; give noise")
        loop, oldest, times = self.chunks, window[0], self.chunks.times
        x, steps = torch.cat([flying.x for flying in window], 2), len(times) - 1
        frames = oldest.x.shape[2], x.shape[2]
        each = [times[flying.step] for flying in window for _ in range(flying.x.shape[2])]
        t = full(each[0] if len(set(each)) == 1 else tuple(each), x)

        def reading(x: Tensor) -> Denoise:
            view = loop.network.recall(_reached(memory, x.shape[2]) if loop.stream.mutual else memory, x)
            constants, guidance = loop.constants, loop.contract.guidance
            return lambda x_t, t, call: guidance(
                loop.network, x_t, t, cond, uncond, replace(call, kv=view, constants=constants)
            )

        lengths = tuple(flying.x.shape[2] for flying in window)
        causal = None if loop.stream.mutual or len(window) == 1 else one_after_the_other(loop.stream, lengths)
        mutual = loop.stream.mutual and self.width > 1
        made = reading(x)(x, t, Call(step=oldest.step, steps=steps, causal=causal, mutual=mutual))  # 2
        moved = tuple(self._moved(window, made, rng))  # 3
        prediction = moved[0].before
        assert prediction is not None
        step = Step(oldest.step, steps, prediction, moved[0].x)
        if moved[0].step < steps:
            return Made(step, window=moved)

        kv = _first(made.kv, *frames) if loop.stream.commit == "last" else None

        def remembered(x: Tensor = moved[0].x, last: Call = Call(step=steps - 1, steps=steps)) -> KVCache:
            return loop.remembered(memory, x, kv, reading(x), last, rng.fold(f"chunk/{oldest.index}"))

        return Made(step, cache(remembered), moved[1:])  # 4

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


def _reached(memory: KVCache, frames: int) -> KVCache:
    """What a call on so many frames reads of a memory: as much as its window has room for beside them."""
    keep = memory.keep
    if not isinstance(keep, Window) or frames <= memory.chunk:
        return memory
    old = memory.start[..., None] - memory.positions > keep.window - keep.sink - frames
    return replace(memory.without(old & (memory.positions >= keep.sink)), chunk=frames)


def _once(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
    raise ValueError(
        "a window has one call per step, and this sampler asks for another one; choose one like Renoise or Euler"
    )


def _first(kv: tuple[KV, ...] | None, frames: int, of: int) -> tuple[KV, ...] | None:
    """Keys and values of the first frames of a call."""
    if kv is None:
        return None
    return tuple((k[:, :, : k.shape[2] // of * frames], v[:, :, : v.shape[2] // of * frames]) for k, v in kv)
