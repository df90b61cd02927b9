"""A stream that can be paused, steered, cancelled, and restored from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.caching import CachePolicy
from fewstep.core import Cond, Seeds
from fewstep.core.call import Constants, every_block
from fewstep.diffusion import DDIM, Euler, Renoise, Step, Stream
from fewstep.streaming.blocks import Chunks, Flying, Made, Reader
from fewstep.streaming.control import inputs_of
from fewstep.streaming.levels import memory_of
from fewstep.streaming.noise import start_noise
from fewstep.streaming.rolling import Rolling
from fewstep.streaming.switch import Fade, Mix, Switch, mixed, require_switch
from fewstep.streaming.video import Video, require_noise


class Streams(Protocol):
    """What a session needs of a `VideoModel`."""

    @property
    def card(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def reader(self) -> Reader: ...

    def conditions(self, prompts: Sequence[str], *, guided: bool) -> tuple[Cond, Cond]: ...

    def latent_shape(self) -> tuple[int, int, int, int]: ...

    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Any: ...

    def clip_frames(self, latents: int) -> int: ...

    def image_latents(self, pictures: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Seen:
    """The frames of the last latents."""

    pictures: Tensor | None = None
    """The last frame that each of them was decoded to, `[B, 3, F, H, W]`; None: nothing was decoded."""
    past: Any = None
    """Memory of the decoder after them."""

    def after(self, x: Tensor, first: int, kept: int, model: Streams) -> Seen:
        """Those of the last `kept` latent frames, after a chunk `x` that begins with latent frame `first`. ValueError for a
        codec whose frames do not come with their latents."""
        made, ends = model.decode_next(x, self.past), [model.clip_frames(first + i) for i in range(x.shape[2] + 1)]
        if made.frames.shape[2] != ends[-1] - ends[0]:
            raise ValueError(
                "this stream encodes the last frame of a latent again as an image, and its codec decodes that frame only after "
                "later latents; take a model with Wan's autoencoder, or set reencode: false"
            )
        last = made.frames[:, :, [end - ends[0] - 1 for end in ends[1:]]]
        pictures = last if self.pictures is None else torch.cat([self.pictures, last], 2)
        return Seen(pictures[:, :, -kept:], made.past)


@dataclass(frozen=True)
class Snapshot:
    """Where a stream is between two chunks: everything that the next one depends on. Nothing in it is ever changed."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    memory: KVCache
    chunks: int = 0
    """Number of chunks made so far."""
    latents: Tensor | None = None
    """Last latents, from which the memory can be made anew for other prompts; None before the first chunk."""
    fade: Fade | None = None
    """Change of prompts that is under way."""
    window: tuple[Flying, ...] = ()
    """Chunks that are denoised already, where several are at once (`Stream.rolling`)."""
    given: Tensor | None = None
    """Latents `[B, C, F, h, w]` of whole chunks that are not made, such as that of an image; None: all are made."""
    since: int = 0
    """Number of the first latent frame of `given` in the stream."""
    seen: Seen = Seen()
    """What `latents` look like, where the first of them is encoded again (`Stream.reencode`)."""


class Session:
    """A stream of latents, chunk by chunk, of a model whose contract has a `stream`.

    >>> session = Session(student, ["a red ball rolls left"])          # doctest: +SKIP
    >>> for latents in session.take(4): ...                            # doctest: +SKIP

    What it is at any moment is its `snapshot`; `Session(model, snapshot)` goes on from there, bit for bit.
    """

    def __init__(
        self,
        model: Streams,
        start: Snapshot | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        cache: CachePolicy | None = None,
        conditions: tuple[Cond, Cond] | None = None,
        force: bool = False,
    ) -> None:
        """`start` is one prompt per clip, or a snapshot; `seed` one seed per clip, or the first of consecutive ones.

        `conditions` are those of the prompts and of the negative ones, where they are ready. ValueError for a model that makes
        whole clips, and for a step count that it was not trained for, unless `force`.
        """
        contract = model.card.contract
        self._chunks = Chunks.of(model.reader, contract, num_inference_steps, force=force)
        if not isinstance(start, Snapshot):
            seeds = range(seed, seed + len(start)) if isinstance(seed, int) else seed
            start = Snapshot(tuple(start), tuple(seeds), self._chunks.begin())
        self._rolling = Rolling(chunks=self._chunks) if self._chunks.stream.rolling > 1 else None
        if self._rolling is not None and cache is not None:
            raise ValueError(
                "a cache policy serves one chunk, and this stream denoises several at once; leave the cache out"
            )
        self._model, self._cache, self.snapshot = model, cache, start
        self._guided, self._making = contract.guidance.active, False
        self._conditions = conditions or model.conditions(start.prompts, guided=self._guided)
        self._kept: tuple[tuple[Tensor, ...], Constants] = (), Constants()

    @property
    def model(self) -> Streams:
        return self._model

    @property
    def stream(self) -> Stream:
        """How the model makes chunks."""
        return self._chunks.stream

    def begin_with(self, latents: Tensor) -> None:
        """Let the next chunks be these latents `[B, C, F, h, w]`, such as those of an image; later chunks read them.

        A stream may begin with them, or a stretch of it. ValueError while a chunk is being made, and as `require_given`.
        """
        if self._making:
            raise ValueError("a chunk is being made; finish its steps or close them before other latents are given")
        self.require_given(latents, self.snapshot.chunks)
        self.snapshot = replace(self.snapshot, given=latents, since=self.stream.begin(self.snapshot.chunks))

    def require_given(self, latents: Tensor, chunk: int) -> None:
        """ValueError for latents that chunk `chunk` and those after it cannot be: half a chunk, or another shape."""
        if self._rolling is not None or self.stream.commit == "nothing":
            raise ValueError(
                "chunks of this stream are denoised several at once, or nothing is remembered; begin it with noise"
            )
        channels, _, height, width = self._model.latent_shape()
        frames = sum(self.stream.lengths(latents.shape[2], chunk))  # refuses half a chunk
        wanted = (len(self.snapshot.prompts), channels, frames, height, width)
        if latents.shape != wanted:
            raise ValueError(f"the stream begins with latents {wanted}, and {tuple(latents.shape)} were given")

    def require(self, how: Switch, over: int = 4) -> None:
        """ValueError for a way to change prompts that there is not, or not for this stream."""
        require_switch(how, over)
        if how == "recache":
            self._chunks.require_recache()
            if reads := ", ".join(inputs_of(self._model.card)):
                raise ValueError(
                    f"this model reads {reads} of every frame, which a memory that is made anew is not told; choose keep, clear "
                    "or lerp"
                )

    def steer(self, prompts: Sequence[str], how: Switch = "keep", *, over: int = 4) -> None:
        """Other prompts, one per clip, from the next chunk on; `how` is a way of `streaming.switch`. With `lerp` the change takes
        `over` chunks (4 is Krea's default).
        """
        self.require(how, over)
        if len(prompts) != len(self.snapshot.prompts):
            raise ValueError(
                f"this session has {len(self.snapshot.prompts)} clips, and was given {len(prompts)} prompts"
            )
        if self._making and how != "keep":
            raise ValueError(
                f"a chunk is being made, and will be remembered as it was begun; finish its steps or close them before {how!r}"
            )
        conditions = self._model.conditions(prompts, guided=self._guided)
        before, fade, memory = self.snapshot, None, self.snapshot.memory
        if how == "lerp":
            fade = Fade(self._mix(before.chunks - 1), before.chunks, over)
        elif how == "clear":
            memory = memory.keep.forget(memory, memory.start)
            if self.stream.recompute:
                before = replace(before, latents=None, seen=replace(before.seen, pictures=None))
        elif how == "recache" and before.latents is not None:
            seeds = Seeds(before.seeds, device=str(self._model.device)).fold(f"recache/{before.chunks}")
            with torch.no_grad():
                memory = self._chunks.recache(memory, before.latents, *conditions, seeds)
        self._conditions, self.snapshot = conditions, replace(before, prompts=tuple(prompts), memory=memory, fade=fade)

    def _mix(self, chunk: int) -> Mix:
        """The prompts of a chunk."""
        prompts, fade = self.snapshot.prompts, self.snapshot.fade
        return ((prompts, 1.0),) if fade is None else fade.at(chunk, prompts)

    def _conditions_of(self, chunk: int) -> tuple[Cond, Cond]:
        mix = self._mix(chunk)
        if len(mix) == 1:
            return self._conditions
        given = [self._model.conditions(prompts, guided=self._guided)[0] for prompts, _ in mix]
        return mixed(given, [weight for _, weight in mix]), self._conditions[1]

    def counts(self, chunks: int) -> tuple[int, ...]:
        """Numbers of steps of the first so many chunks: those that `steps` makes."""
        if self._rolling is not None:
            return tuple(map(self._rolling.count, range(chunks)))
        return tuple(len(self._chunks.grid(index)) - 1 for index in range(chunks))

    @torch.no_grad()
    def steps(
        self,
        video: Video | None = None,
        *,
        extra: Mapping[str, Tensor] = MappingProxyType({}),
        left: int | None = None,
    ) -> Iterator[Step]:
        """The next chunk, step by step; the latents of its last step are the chunk's. They are there before the chunk is
        remembered, which happens when the iterator is asked for more. Given up before, it was never begun.

        It starts from noise, or from this chunk of a `video`. `extra` is what the conditions say of this chunk alone, such as
        `pose` (`attention.Facing`). `left` is the number of chunks until the stream ends, with this one; None: it has no end.
        Only where several chunks are denoised at once, the last ones depend on it. ValueError for latents of another shape.
        """
        before, index = self.snapshot, self.snapshot.chunks
        first = self.stream.begin(index)
        if video is None:
            require_noise(self._chunks.contract.grid)
        if self._rolling is None:
            cond, uncond = self._told(index, extra)
            making = self._one(video, cond, uncond)
        elif video is None and not extra:
            making = self._several(self._rolling, *self._conditions_of(index), None if left is None else index + left)
        else:
            raise ValueError(
                "this stream denoises several chunks at once, from noise and with one condition; leave out video and extra"
            )
        self._making = True
        try:
            for made in making:
                yield made.step
                if (memory := made.memory) is not None:
                    latents, seen = self._chunks.recent(before.latents, made.x, index), before.seen
                    if self.stream.reencode:
                        seen = seen.after(made.x, first, latents.shape[2], self._model)
                    self.snapshot = replace(
                        self.snapshot, memory=memory, chunks=index + 1, latents=latents, window=made.window, seen=seen
                    )
        finally:
            self._making = False

    def _one(self, video: Video | None, cond: Cond, uncond: Cond) -> Iterator[Made]:
        """The next chunk, from its first step to its last."""
        before, index = self.snapshot, self.snapshot.chunks
        chunks, path = replace(self._chunks, constants=self._constants(cond, uncond)), self._chunks.network.path
        seen = before.seen.pictures
        image = None if seen is None else self._model.image_latents(seen[:, :, 0])
        memory = chunks.ready(before.memory, before.latents, cond, uncond, self._seeds, image=image)
        noise = start_noise(chunks.stream, index, self._size, self._seeds)
        if video is not None and chunks.stream.commit == "levels":
            raise ValueError(
                "a video starts at a later step, and this stream remembers every step; leave the video out"
            )
        if video is None:
            start = path.prior(noise)
        else:
            start, times = video.start(index, noise, path, chunks.contract.grid, chunks.grid(index))
            chunks = chunks.at(times)
        runner = every_block if self._cache is None else self._cache.begin()
        rng = self._seeds.fold(f"chunk/{index}")
        if (given := self._given(index)) is not None:
            return chunks.known(memory, given, cond, uncond, rng, index)
        return chunks.chunk(memory, start, cond, uncond, rng, runner=runner)

    def _told(self, index: int, extra: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[Cond, Cond]:
        """Conditions of a chunk, of its own frames, and what is extra."""
        first, length = self.stream.begin(index), self.stream.length(index)
        cond, uncond = (told.during(first, length).with_extra(extra) for told in self._conditions_of(index))
        return cond, uncond

    def _given(self, index: int) -> Tensor | None:
        """Latents of a chunk, if they are given."""
        first, given = self.stream.begin(index) - self.snapshot.since, self.snapshot.given
        part = None if given is None else given[:, :, first : first + self.stream.length(index)]
        return part if part is not None and part.shape[2] else None

    def require_hops(self, processes: int) -> None:
        """ValueError unless so many processes can share the steps of this stream, each with the memory of one (`pipelined`)."""
        loop, steps = self._chunks, len(self._chunks.times) - 1
        if self.stream.commit != "levels":
            raise ValueError(
                "processes share the steps of a stream that remembers each of them; set its commit to levels"
            )
        if processes != steps:
            raise ValueError(f"{steps} steps need as many processes, not {processes}")
        if not isinstance(loop.contract.sampler, DDIM | Euler | Renoise):
            raise ValueError(
                f"{type(loop.contract.sampler).__name__} may need more of a chunk than its latents; choose Renoise, Euler or DDIM"
            )
        memory_of(self.snapshot.memory, 0, steps)

    def hops(self, level: int, count: int, receive: Callable[[tuple[int, ...]], Tensor]) -> Iterator[Tensor]:
        """Step `level` of the next `count` chunks, each before it is remembered: latents after it. Those before it are noise, or
        what `receive` gives for their shape. The session stays where it is."""
        before, loop = self.snapshot, self._chunks
        memory = memory_of(before.memory, level, len(loop.times) - 1)
        for index in range(before.chunks, before.chunks + count):
            (cond, uncond), given, length = self._told(index), self._given(index), self.stream.length(index)
            rng, (batch, channels, height, width) = self._seeds.fold(f"chunk/{index}"), self._size
            if level:
                x = receive((batch, channels, length, height, width))
            elif given is not None:
                x = given
            else:
                x = loop.network.path.prior(start_noise(self.stream, index, self._size, self._seeds))
            loop = replace(loop, constants=self._constants(cond, uncond))
            x, kv = loop.hop(memory, x, level, cond, uncond, rng, known=given is not None)
            yield x
            memory = memory.commit(kv, length)

    def _several(self, rolling: Rolling, cond: Cond, uncond: Cond, count: int | None) -> Iterator[Made]:
        """The next chunk, and steps of those that follow it, of `count` in the whole stream."""
        before, size, seeds = self.snapshot, self._size, self._seeds
        rolling = replace(rolling, chunks=replace(self._chunks, constants=self._constants(cond, uncond)))

        def start(index: int) -> Tensor | None:
            return rolling.start(index, size=size, rng=seeds, count=count)

        return rolling.chunk(before.memory, before.window, start, cond, uncond, seeds)

    @property
    def _seeds(self) -> Seeds:
        return Seeds(self.snapshot.seeds, device=str(self._model.device))

    @property
    def _size(self) -> tuple[int, int, int, int]:
        """Latents `[B, C, f, H, W]` without their frames."""
        channels, _, height, width = self._model.latent_shape()
        return len(self.snapshot.prompts), channels, height, width

    def _constants(self, *conditions: Cond) -> Constants:
        """What calls share while the conditions are the same tensors."""
        now = tuple(tensor for given in conditions for tensor in given.tensors)
        if len(now) != len(self._kept[0]) or any(a is not b for a, b in zip(now, self._kept[0])):
            self._kept = now, Constants()
        return self._kept[1]

    def take(self, chunks: int, video: Video | None = None) -> Iterator[Tensor]:
        """The next chunks, latents `[B, C, f, h, w]` each, as soon as they are made."""
        for _ in range(chunks):
            *_, last = self.steps(video)
            yield last.x
