"""Self-Forcing: the student is trained on the stream that its own loop makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Count
from fewstep.diffusion import Contract, Stream
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit
from fewstep.methods.rollouts.grids import Exit, deepest, drawn, stops
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import Chunks, Made


@dataclass(frozen=True, kw_only=True)
class SelfForced(Rollout):
    """The loop that serves a stream, chunk by chunk, each stopped at one exit step (2506.08009, algorithm 1).

    The call at the exit carries gradient; what is remembered of a chunk carries none. So the gradient of a chunk is that of one
    call, whatever the length of the stream. With several grids, each rollout draws a grid and then the exit.

    With `clips` the stream is longer than what the teacher knows, and a random stretch as long as one clip is trained on
    (Self-Forcing++, 2510.02283). What comes before it is made with all steps, as in sampling, and without gradient; what comes
    after it is not made. The law of its start is not published: every chunk of the longer stream is as likely. The paper's
    backward noise initialisation is what DMD does anyway: it adds noise to the stretch itself.
    """

    stream: Stream = Stream()
    """How a clip is made chunk by chunk, in training and afterwards."""
    exit: Exit = "random"
    """Step to stop at, the same in all chunks: a random one or the last."""
    clips: Count = 1
    """Length of a rollout in clips of the teacher's length; the last one of a random number up to this is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream.steps:
            raise ValueError(
                f"a rollout stops all chunks at one step, and those of this stream take {self.stream.steps} steps; leave "
                "stream.steps out in training, and set it in the student's contract"
            )

    @property
    def calls(self) -> float:
        """Those that make keys and values to remember are calls, too."""
        remember = 0 if self.stream.commit == "last" else 1
        ahead = (self.clips - 1) / 2 * (remember + fmean(map(len, self.grids)))
        return ahead + remember + fmean(fmean(found) + 1 for found in stops(self.grids, self.exit))

    @property
    def fullest(self) -> Mapping[str, int]:
        return deepest(self.grids) | ({"stretch": 2**31} if self.clips > 1 else {})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid, stop = drawn(self.grids, self.exit, self.shift, rng)
        contract = Contract(sampler=self.sampler, steps=len(grid), stream=self.stream)
        loop = Chunks(network=student, contract=contract, times=(*grid, 0.0))
        first, lengths = self._stretch(batch.latent_shape[1], rng)
        memory, noises, made = loop.begin(), list[Tensor](), list[list[Visit]]()
        for index, (begin, length) in enumerate(zip(accumulate(lengths, initial=0), lengths)):
            own, trained = rng.fold(f"chunk/{index}"), index >= first
            noise = own.randn((*batch.noise_shape[:2], length, *batch.noise_shape[3:]), "start")
            visits, start, cond = list[Visit](), student.path.prior(noise), batch.cond.during(begin, length)
            with torch.set_grad_enabled(grad and trained):
                for step in loop.chunk(memory, start, cond, cond, own, exit=stop if trained else None):
                    visits.append(_visit(step))
                memory = step.memory or memory
            if trained:
                noises.append(noise)
                made.append(visits)
        (*before, last) = (_joined(visits) for visits in zip(*made, strict=True))
        return Rolled(last.x0, last.x_t, last.t, tuple(before), torch.cat(noises, 2), exit=stop, grid=grid)

    def _stretch(self, frames: int, rng: Rng) -> tuple[int, tuple[int, ...]]:
        """The first chunk that is trained on, and the lengths of all chunks up to the last one of the stretch."""
        if self.clips == 1:
            return 0, self.stream.lengths(frames)
        lengths = self.stream.lengths(self.clips * frames)
        bounds = [0, *accumulate(lengths)]
        starts = [i for i, low in enumerate(bounds) if low + frames in bounds]
        first = starts[rng.integer("stretch", len(starts))]
        return first, lengths[: bounds.index(bounds[first] + frames)]

    def contract(self, teacher: Contract) -> Contract:
        """It streams."""
        return replace(super().contract(teacher), stream=self.stream)


def _visit(made: Made) -> Visit:
    """A step of a chunk, without the keys and values that it made."""
    return Visit(made.x, made.step.prediction.x_t, made.step.prediction.t)


def _joined(chunks: tuple[Visit, ...]) -> Visit:
    """The same step of every chunk, as one call."""
    return Visit(torch.cat([v.x0 for v in chunks], 2), torch.cat([v.x_t for v in chunks], 2), chunks[0].t)
