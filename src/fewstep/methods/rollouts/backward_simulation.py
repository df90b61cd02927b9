"""Backward simulation: the student is trained on what its own sampler makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Rng
from fewstep.diffusion import Prediction, shifted
from fewstep.diffusion.samplers import full
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit
from fewstep.methods.rollouts.grids import WHOLE, Exit, Phase, deepest, drawn, require_phase, stops
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class BackwardSimulation(Rollout):
    """The student's own sampler up to an exit step (2405.14867, section 4.5); the call at the exit has gradient.

    With several grids, each rollout first draws a grid and then the exit. So a student that serves several step counts sees, at
    each time, the inputs that all its samplers give it. `grids=((1.0,),)` is one step, from pure noise to clean latents.
    """

    exit: Exit = "random"
    """Step to stop at: a random one or the last."""
    grad_calls: int = 1
    """Number of last calls that carry gradient; the gradient flows from one call to the next."""
    phase: Phase | None = None
    """Steps to stop at, and so to train: those from times in (low, high], before the shift (Phased DMD, 2510.27684). null: all,
    and each is a phase of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_phase(self.grids, self.span)
        if self.grad_calls < 1:
            raise ValueError(f"grad_calls must be at least 1, got {self.grad_calls}")

    @property
    def span(self) -> Phase:
        """The phase, or all steps."""
        return WHOLE if self.phase is None else self.phase

    @property
    def calls(self) -> float:
        return fmean(fmean(found) + 1 for found in stops(self.grids, self.exit, self.span))

    @property
    def work(self) -> float:
        graded = (
            fmean(min(stop + 1, self.grad_calls) for stop in found) for found in stops(self.grids, self.exit, self.span)
        )
        return self.calls + 2 * fmean(graded)

    @property
    def fullest(self) -> Mapping[str, int]:
        """The longest grid with the last exit: it has most calls, and most of them with gradient."""
        return deepest(self.grids, self.span)

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid, stop = drawn(self.grids, self.exit, self.shift, rng, self.span)
        noise, before = rng.randn(batch.noise_shape, "noise"), list[Visit]()

        def call_student(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            with torch.set_grad_enabled(grad and call.step > stop - self.grad_calls):
                return student(x_t, t, batch.cond, call)

        x = student.path.prior(noise)
        for step in islice(self.sampler.sampling(call_student, x, (*grid, 0.0), rng=rng), stop):
            before.append(Visit(step.prediction.x0, step.prediction.x_t, step.prediction.t))
            x = step.x
        last = call_student(x, full(grid[stop], x), Call(step=stop, steps=len(grid), rng=rng))
        with torch.set_grad_enabled(grad):
            return Rolled(last.x0, x, last.t, tuple(before), noise, exit=stop, grid=grid)

    def landing(self, rolled: Rolled) -> float:
        """The time at which the last step of this rollout lands: where the next one begins, or at the end of its phase."""
        times = (*rolled.grid, 0.0)
        if self.phase is None:
            return times[rolled.exit + 1]
        return times[stops((rolled.grid,), "last", self.shifted_phase)[0][0] + 1]

    @property
    def shifted_phase(self) -> Phase:
        """The phase in times as the network is told."""
        low, high = (float(t) for t in shifted(torch.tensor(self.span, dtype=torch.float64), self.shift))
        return low, high
