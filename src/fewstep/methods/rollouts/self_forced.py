"""Self-Forcing: the student is trained on the stream that its own loop makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
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
    """

    stream: Stream = Stream()
    """How a clip is made chunk by chunk, in training and afterwards."""
    exit: Exit = "random"
    """Step to stop at, the same in all chunks: a random one or the last."""

    @property
    def calls(self) -> float:
        """Those that make keys and values to remember are calls, too."""
        remember = 0 if self.stream.commit == "last" else 1
        return remember + fmean(fmean(found) + 1 for found in stops(self.grids, self.exit))

    @property
    def fullest(self) -> Mapping[str, int]:
        return deepest(self.grids)

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid, stop = drawn(self.grids, self.exit, self.shift, rng)
        contract = Contract(sampler=self.sampler, steps=len(grid), stream=self.stream)
        loop, (clips, channels, frames, *size) = (
            Chunks(network=student, contract=contract, times=(*grid, 0.0)),
            batch.noise_shape,
        )
        memory, noises, made = loop.begin(), list[Tensor](), list[list[Made]]()
        for index, length in enumerate(self.stream.lengths(frames)):
            own = rng.fold(f"chunk/{index}")
            noises.append(own.randn((clips, channels, length, *size), "start"))
            start = student.path.prior(noises[-1])
            with torch.set_grad_enabled(grad):
                made.append(list(loop.chunk(memory, start, batch.cond, batch.cond, own, exit=stop)))
            memory = made[-1][-1].memory or memory
        (*before, last) = (_visit(steps) for steps in zip(*made, strict=True))
        x0 = torch.cat([steps[-1].x for steps in made], 2)
        return Rolled(x0, last.x_t, last.t, tuple(before), torch.cat(noises, 2), exit=stop, grid=grid)

    def contract(self, teacher: Contract) -> Contract:
        """It streams."""
        return replace(super().contract(teacher), stream=self.stream)


def _visit(steps: tuple[Made, ...]) -> Visit:
    """The same step of every chunk, as one call."""
    seen = [made.step.prediction for made in steps]
    return Visit(torch.cat([p.x0 for p in seen], 2), torch.cat([p.x_t for p in seen], 2), seen[0].t)
