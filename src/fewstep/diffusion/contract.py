"""The sampling contract stored with the weights: sampler, times, guidance, stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.core.bounds import Count, Decay, Natural, Positive, Size
from fewstep.core.build import At, Names, build, build_arguments
from fewstep.diffusion.first_version import objects
from fewstep.diffusion.free_noise import FreeNoise
from fewstep.diffusion.grids import Shifted, TimeGrid
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.samplers import Euler, Sampler

Standing = Literal["absolute", "window", "sink", "rebased"]
"""Where remembered frames stand, as rotary embedding is told (`attention.kv.standing`)."""


class Memory(ABC):
    """What the memory of a stream holds. A contract only names it; the policies are `attention.KEEPS`."""

    @abstractmethod
    def check(self, chunk: int) -> None:
        """ValueError unless it can serve chunks of up to so many frames."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How a student makes a clip chunk by chunk, each from what it remembers of the chunks before it."""

    chunks: tuple[Size, ...] = (1,)
    """Latent frames of each chunk; the last number repeats: `(1, 3)` is 1, 3, 3, ..."""
    steps: tuple[Size, ...] = ()
    """Number of steps of each chunk; the last number repeats: `(4, 2)` is 4, 2, 2, ... (ASD, 2511.01419, has more steps in the
    first chunk). Each must be a step count of the contract. Empty: the contract's own number in every chunk."""
    rolling: Natural = 0
    """Chunks that are denoised at once, each a step or more behind the one before it (Rolling Forcing, 2509.25161: as many as
    there are steps; StreamDiT, 2507.03745: fewer). The number of steps must be a multiple. 0: one chunk after the other."""
    mutual: bool = True
    """Whether chunks that are denoised at once read each other in both directions, for which a student must be trained. false: a
    chunk reads those before it alone, as far as they are by then (Block Cascading, 2511.20426)."""
    noise: FreeNoise | None = None
    """Noise of earlier frames that later ones start from; null: each chunk has its own."""
    window: Natural = 0
    """Latent frames that a call may read, including the sink and its own frames; 0: all. Short for `memory: {type: Window}`."""
    sink: Natural = 0
    """First frames of the stream that stay in memory; they count towards `window`."""
    memory: Memory | None = None
    """Policy that says what is remembered, such as `{type: Retrieval, frames: 6}`. null: what `window` and `sink` say."""
    commit: Literal["clean", "noised", "last", "levels", "nothing"] = "clean"
    """Keys and values to remember of a finished chunk: those of one more call on its clean latents (`clean`), those of one
    more call on its latents noised to `context_time` (`noised`), those of its last step (`last`), without another call, those of
    every step, each for the same step of later chunks (`levels`; Live Avatar, 2512.04677), or none (`nothing`): a call reads its
    own frames alone, and they stand at its beginning (StreamDiT, 2507.03745)."""
    context_time: Decay = 0.0
    """Time of the noised latents if `commit` is `noised`."""
    recompute: bool = False
    """Whether the memory is made anew before every chunk, from the last latents that `window` has room for and with the prompts
    of that chunk (Krea Realtime). Nothing older reaches a chunk, not even through what they had read."""
    reencode: bool = False
    """Whether the first of these latents becomes that of an image, when the stream has moved on (Krea Realtime): its last frame
    as it was decoded, encoded alone. The latent of a clip's first frame has other statistics than those that follow."""
    past_weight: Positive = 1.0
    """How much a remembered token counts in attention, where one of the chunk counts 1: 0.3 adds log 0.3 to its logit (Krea
    Realtime's report, against errors of the past; for students that were trained without it). The oldest frame counts 1."""
    positions: Standing = "absolute"
    """Position of a remembered frame. `absolute`: its place in the stream. `window`: its place among the remembered frames.
    `sink`: its place in the stream, but the sink stands just before the oldest other frame. `rebased`: its place in the stream
    until the network's table of positions ends; then all move down."""

    def __post_init__(self) -> None:
        if not self.chunks or min(self.chunks) < 1:
            raise ValueError(f"chunks have at least 1 latent frame each, and there is at least one; got {self.chunks}")
        if self.steps and min(self.steps) < 1:
            raise ValueError(f"a chunk takes at least 1 step; got steps={self.steps}")
        if self.rolling < 0 or (self.rolling and self.steps):
            raise ValueError(
                f"chunks that are denoised at once are at least 0 and take one number of steps; got rolling={self.rolling} and "
                f"steps={self.steps}"
            )
        self._check_memory()
        if not 0 < self.past_weight <= 1:
            raise ValueError(f"past_weight is above 0, and 1 at most; got {self.past_weight}")
        if (self.commit == "noised") != (0 < self.context_time < 1):
            raise ValueError(
                f"context_time is the time, between 0 and 1, at which noised latents are remembered, and 0 otherwise; got "
                f"{self.context_time} with commit {self.commit}"
            )
        if self.commit == "levels" and (self.steps or self.rolling):
            raise ValueError(
                "a memory for each step is that of one number of steps, and of one chunk after the other; leave steps and "
                "rolling out"
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        if not self.recompute:
            if self.reencode:
                raise ValueError(
                    "only a memory that is made anew has a first latent that can be encoded again; set recompute: true, or "
                    "reencode: false"
                )
            return
        if not self.window or self.sink:
            raise ValueError(
                "a memory that is made anew from the last latents has a window and no sink; give window, and leave sink and "
                f"memory out; got window={self.window} and sink={self.sink}"
            )
        if self.rolling or not self.commits:
            raise ValueError(
                "a memory is made anew from finished latents, for one chunk after the other; leave rolling out, and let commit "
                f"be clean or noised; got rolling={self.rolling} and commit={self.commit}"
            )

    def _check_memory(self) -> None:
        if self.memory is not None:
            if self.commit == "nothing":
                raise ValueError(f"nothing is remembered, so leave memory out, not {type(self.memory).__name__}")
            if self.window or self.sink:
                raise ValueError(
                    f"memory says what is remembered, and so do window={self.window} and sink={self.sink}; set them in memory"
                )
            self.memory.check(max(self.chunks))
            return
        if self.sink < 0 or self.window < 0:
            raise ValueError(f"window and sink cannot be negative, got {self.window} and {self.sink}")
        if not self.window and (self.sink or self.positions != "absolute"):
            raise ValueError(
                "a stream that reads all its past has no sink and no positions in a window; give a window or a memory"
            )
        own = (max(self.rolling, 1) if self.mutual else 1) * max(self.chunks)
        if self.commit == "nothing" and self.window:
            raise ValueError(f"nothing is remembered, so no window bounds what is read; leave out window={self.window}")
        if self.window and self.window < self.sink + own:
            what = f"{self.rolling} chunks" if own > max(self.chunks) else "a chunk"
            raise ValueError(
                f"a window of {self.window} frames cannot hold a sink of {self.sink} and {what} of {max(self.chunks)}"
            )

    @property
    def commits(self) -> int:
        """Calls that are made only to remember, for each chunk; in the long run where the memory is made anew."""
        if self.commit not in ("clean", "noised"):
            return 0
        return max((self.window - max(self.chunks)) // self.chunks[-1], 1) if self.recompute else 1

    def length(self, index: int) -> int:
        """Latent frames of chunk `index`, counted from 0."""
        return self.chunks[min(index, len(self.chunks) - 1)]

    def begin(self, index: int) -> int:
        """Latent frames before chunk `index`."""
        return sum(self.chunks[:index]) + max(0, index - len(self.chunks)) * self.chunks[-1]

    def index(self, frame: int) -> int:
        """Number of the chunk that begins at latent frame `frame`. ValueError inside a chunk."""
        index = begin = 0
        while begin < frame:
            begin, index = begin + self.length(index), index + 1
        if begin != frame:
            raise ValueError(f"no chunk of {list(self.chunks)} latent frames begins at frame {frame}")
        return index

    def lengths(self, frames: int, first: int = 0) -> tuple[int, ...]:
        """Lengths of the chunks of `frames` latent frames: those of a clip, or from chunk `first` on.

        >>> Stream(chunks=(1, 3)).lengths(7)
        (1, 3, 3)
        """
        found: list[int] = []
        while sum(found) < frames:
            found.append(self.length(first + len(found)))
        if sum(found) != frames:
            raise ValueError(
                f"chunks of {list(self.chunks)} latent frames make clips of {sum(found[:-1])} or {sum(found)}, not {frames}"
            )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Contract:
    """How a model must be sampled to get what was measured.

    A teacher takes any number of steps. A student has the exact times of each step count it was trained for, and refuses
    others.
    """

    grid: TimeGrid = Shifted()
    sampler: Sampler = Euler()
    steps: Count = 50
    """Default number of steps."""
    guidance: CFG = CFG()
    """Guidance to apply in sampling; scale 1 if guidance is distilled into the student."""
    stream: Stream | None = None
    """How a streaming student generates clips chunk by chunk; None: whole clips."""

    @classmethod
    def from_tree(cls, tree: Any, names: Names, at: At) -> Contract:
        """From keys and values, also those of the first version."""
        arguments = build_arguments(cls, objects(build(dict[str, Any], tree, names, at), at), names, at)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise at.fail(f"is refused by {cls.__name__}: {error}") from error

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a clip takes at least 1 step, got steps={self.steps}")
        for count in () if self.stream is None else self.stream.steps:
            self.grid.times(count)  # StepCountError for a number of steps that it was not trained for

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts it was trained for, increasing; of a teacher, which takes any, its default alone."""
        return self.grid.counts or (self.steps,)

    @property
    def trained(self) -> dict[int, tuple[float, ...]]:
        """The exact times of each step count that a student was trained for; empty of a teacher."""
        return {count: self.grid.times(count) for count in self.grid.counts}

    def times(self, steps: int | None = None, *, force: bool = False) -> tuple[float, ...]:
        """The times to visit for `steps` (default: the contract's own). StepCountError if untrained, unless `force`."""
        steps = self.steps if steps is None else steps
        grid = self.grid.free if force and steps not in self.grid.counts else self.grid
        return grid.times(steps)

    def calls(self, steps: int | None = None) -> int:
        """NFE: network evaluations per clip, guidance counted (two per step when it is on, three with STG). Of a stream: per
        chunk, in the long run; those that make what is remembered are not counted."""
        if steps is None:
            steps = self.stream.steps[-1] if self.stream is not None and self.stream.steps else self.steps
        return self.sampler.calls(steps) * self.guidance.passes
