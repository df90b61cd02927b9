"""Self-Forcing: the student is trained on the stream that its own loop makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Amount, Count, Natural
from fewstep.diffusion import Contract, Stream
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit, joined
from fewstep.methods.rollouts.grids import Exit, deepest, drawn, stops
from fewstep.methods.rollouts.noisy_past import reading
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

    With `overlap` the first frames of a stretch that does not begin its stream are seen by teacher and critic, and not trained
    (2506.08009): they are made like what comes before them. Not as published: the papers replace the first latent of such a
    stretch by an image latent (decode, and encode its last frame alone), because the teacher's clips begin with one. A rollout
    has no autoencoder, so the latents stay as they are; for codecs that know no time this is the same.
    """

    stream: Stream = Stream()
    """How a clip is made chunk by chunk, in training and afterwards."""
    exit: Exit = "random"
    """Step to stop at, the same in all chunks: a random one or the last."""
    clips: Count = 1
    """Length of a rollout in clips of the teacher's length; the last one of a random number up to this is trained on."""
    overlap: Natural = 0
    """First latent frames of a later stretch that are seen and not trained: whole chunks (published: one frame, or one chunk)."""
    history_noise: Amount = 0.0
    """Noise on what is read of the past in training, relative to its root mean square (`NoisyPast`; Live Avatar, 2512.04677);
    0: none. Sampling never has any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream.steps:
            raise ValueError(
                f"a rollout stops all chunks at one step, and those of this stream take {self.stream.steps} steps; leave "
                "stream.steps out in training, and set it in the student's contract"
            )
        if self.overlap and self.clips == 1:
            raise ValueError(
                "overlap is the beginning of a later stretch; let a rollout have more clips, or write overlap: 0"
            )

    @property
    def whole(self) -> bool:
        return not self.overlap

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
        begin, first, lengths = self._stretch(batch.latent_shape[1], rng)
        memory, past, noises, made = loop.begin(), list[Tensor](), list[Tensor](), list[list[Visit]]()
        for index, length in enumerate(lengths):
            own, trained = rng.fold(f"chunk/{index}"), index >= first
            noise = own.randn((*batch.noise_shape[:2], length, *batch.noise_shape[3:]), "start")
            visits, start = list[Visit](), student.path.prior(noise)
            chunks = reading(loop, self.history_noise, own) if trained else loop
            with torch.set_grad_enabled(grad and trained):
                for step in chunks.chunk(memory, start, batch.cond, batch.cond, own, exit=stop if trained else None):
                    visits.append(visit(step))
                memory = step.memory or memory
            if trained:
                noises.append(noise)
                made.append(visits)
            elif index >= begin:
                past.append(visits[-1].x0)
        *before, last = joined(made)
        seen = torch.cat(past, 2) if past else None
        return Rolled(last.x0, last.x_t, last.t, tuple(before), torch.cat(noises, 2), exit=stop, grid=grid, past=seen)

    def _stretch(self, frames: int, rng: Rng) -> tuple[int, int, tuple[int, ...]]:
        """The first chunk that is seen, the first one that is trained on, and the lengths of all chunks up to the last one of the
        stretch."""
        if self.clips == 1:
            return 0, 0, self.stream.lengths(frames)
        lengths = self.stream.lengths(self.clips * frames)
        bounds = [0, *accumulate(lengths)]
        starts = [i for i, low in enumerate(bounds) if low + frames in bounds]
        begin = starts[rng.integer("stretch", len(starts))]
        trained = bounds[begin] + (self.overlap if begin else 0)
        if trained not in bounds or trained >= bounds[begin] + frames:
            raise ValueError(
                f"an overlap of {self.overlap} frames is not whole chunks of {list(self.stream.chunks)} in a clip of {frames}; "
                "give a sum of its first chunks that leaves some"
            )
        return begin, bounds.index(trained), lengths[: bounds.index(bounds[begin] + frames)]

    def contract(self, teacher: Contract) -> Contract:
        """It streams."""
        return replace(super().contract(teacher), stream=self.stream)


def visit(made: Made) -> Visit:
    """A step of a chunk, without the keys and values that it made."""
    return Visit(made.x, made.step.prediction.x_t, made.step.prediction.t)
