"""Self-Forcing: the student is trained on the stream that its own loop makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm
from statistics import fmean

import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Batch, Rng
from fewstep.core.bounds import Amount, Count, Natural
from fewstep.diffusion import Contract, Stream
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit, aligned, calls_of
from fewstep.methods.rollouts.context import Context, require_frames
from fewstep.methods.rollouts.grids import Exit, deepest, drawn, stops
from fewstep.methods.rollouts.noisy_past import reading
from fewstep.methods.rollouts.stretch import Stretch, require_stretch
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import Chunks
from fewstep.streaming.noise import start_noise


@dataclass(frozen=True, kw_only=True)
class SelfForced(Rollout):
    """The loop that serves a stream, chunk by chunk, each stopped at one exit step (2506.08009, algorithm 1).

    The call at the exit carries gradient; what is remembered of a chunk carries none. So the gradient of a chunk is that of one
    call, whatever the length of the stream. With several grids, each rollout draws a grid and then the exit.

    Where the stream has `steps` of its own (Diagonal Distillation, 2603.09488), each of `grids` belongs to the chunks of as many
    steps, and one draw says after which share of its steps every chunk stops: each step of a chunk is as likely, also where
    chunks differ. With `commit: last` a chunk reads what the exit call of the chunk before it left, and nothing else is called.

    With `clips` the stream is longer than what the teacher knows, and a random stretch as long as one clip is trained on
    (Self-Forcing++, 2510.02283). What comes before it is made with all steps, as in sampling, and without gradient; what comes
    after it is not made. The law of its start is not published: every chunk of the longer stream is as likely. The paper's
    backward noise initialisation is what DMD does anyway: it adds noise to the stretch itself.

    With `overlap` the first frames of a stretch that does not begin its stream are seen by teacher and critic, and not trained
    (2506.08009): they are made like what comes before them (`Stretch`).
    """

    stream: Stream = Stream()
    """How a clip is made chunk by chunk, in training and afterwards."""
    exit: Exit = "random"
    """Step to stop at, in all chunks after the same share of their steps: a random one or the last."""
    clips: Count = 1
    """Length of a rollout in clips of the teacher's length; the last one of a random number up to this is trained on."""
    overlap: Natural = 0
    """First latent frames of a later stretch that are seen and not trained: whole chunks (published: one frame, or one chunk)."""
    given: Natural = 0
    """First chunks that are those of the data, such as a reference image that stays in the sink (TalkingMachines, 2506.03099):
    remembered and seen, not trained. Streams begin so with `Session.begin_with`."""
    context: bool = False
    """Let teacher and critic of a later stretch read what the student's chunks have read before it (context forcing, 2512.14614).
    Otherwise they see the stretch alone, and what the student does to agree with earlier frames is an error to them."""
    history_noise: Amount = 0.0
    """Noise on what is read of the past in training, relative to its root mean square (`NoisyPast`; Live Avatar, 2512.04677);
    0: none. Sampling never has any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own, given = set(self.stream.steps), [len(grid) for grid in self.grids]
        if own and sorted(given) != sorted(own):
            raise ValueError(
                f"chunks of this stream take {', '.join(map(str, self.stream.steps))} steps, and grids has lists of "
                f"{', '.join(map(str, given))} times; give one list for each of these numbers of steps"
            )
        if self.stream.rolling > 1:
            raise ValueError(
                f"this stream denoises {self.stream.rolling} chunks at once, and this rollout one chunk after the other; take "
                "RollingForced, or leave stream.rolling out"
            )
        require_stretch(self.stream, self.clips, self.overlap, self.given, self.context)
        if self.context:
            require_frames(self.stream)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"} if self.given else ())

    @property
    def whole(self) -> bool:
        return not (self.overlap or self.given or self.context)

    @property
    def calls(self) -> float:
        """Those that make keys and values to remember are calls, too. Of chunks with steps of their own: in the long run."""
        remember = self.stream.commits
        long = [grid for grid in self.grids if len(grid) in self.stream.steps[-1:]] or self.grids
        ahead = (self.clips - 1) / 2 * (remember + fmean(map(len, long)))
        return ahead + remember + fmean(fmean(found) + 1 for found in stops(tuple(long), self.exit))

    @property
    def fullest(self) -> Mapping[str, int]:
        """The longest grid, its last exit, and the last stretch; with an overlap the first, all of which is trained."""
        drawn = {"exit": lcm(*self.stream.steps) - 1} if self.stream.steps else deepest(self.grids)
        return drawn | ({"stretch": 0 if self.overlap else 2**31} if self.clips > 1 else {})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        loop, exit, of = self._drawn(student, rng)
        part = Stretch.drawn(self.stream, batch.latent_shape[1], self.clips, self.overlap, self.given, rng)
        memory, past, noises, made, latents = loop.begin(), list[Tensor](), list[Tensor](), list[list[Visit]](), None
        before, read = list[Tensor](), list[KVCache]()
        for index, (frame, length) in enumerate(zip(accumulate(part.lengths, initial=0), part.lengths)):
            own, trained, cond = rng.fold(f"chunk/{index}"), index >= part.first, batch.cond.during(frame, length)
            if index < self.given:
                x = batch.require("x0")[:, :, frame : frame + length]
                memory, latents = loop.given(memory, x, cond, own, index), loop.recent(latents, x, index)
                past.append(x)
                continue
            stop = exit * (len(loop.grid(index)) - 1) // of if trained else None
            noise = start_noise(self.stream, index, batch.frame_shape, rng)
            chunks = reading(loop, self.history_noise, own) if trained else loop
            known = loop.ready(memory, latents, cond, cond, rng)
            start = student.path.prior(noise)
            visits, memory = calls_of(chunks, known, start, (cond, cond), own, exit=stop, grad=grad and trained)
            latents = loop.recent(latents, visits[-1].x0.detach(), index)
            if self.context and index < part.begin:
                before.append(visits[-1].x0.detach())
            elif self.context:
                read.append(known.facing(cond.extra.get("pose")))
            if trained:
                noises.append(noise)
                made.append(visits)
            elif index >= part.begin:
                past.append(visits[-1].x0)
        (*calls, last), seen = aligned(made, apart=bool(self.stream.steps)), torch.cat(past, 2) if past else None
        return Rolled(
            last.x0, last.x_t, last.t, tuple(calls), torch.cat(noises, 2), exit=len(calls), grid=loop.times[:-1], past=seen,
            context=Context.of(self.stream, before, read),
        )  # fmt: skip

    def _drawn(self, student: Predictor, rng: Rng) -> tuple[Chunks, int, int]:
        """The loop, and the share of its steps after which a chunk stops: `exit` of `of`."""
        loop = Chunks(network=student, contract=self.contract(Contract()), times=())
        if not self.stream.steps:
            grid, stop = drawn(self.grids, self.exit, self.shift, rng)
            return replace(loop, times=(*grid, 0.0)), stop, len(grid)
        of = lcm(*self.stream.steps)
        return loop, rng.integer("exit", of) if self.exit == "random" else of - 1, of

    def contract(self, teacher: Contract) -> Contract:
        """It streams."""
        return replace(super().contract(teacher), stream=self.stream)
