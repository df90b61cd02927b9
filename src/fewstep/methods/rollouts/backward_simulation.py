"""Backward simulation: the student is trained on what its own sampler makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Rng
from fewstep.diffusion import Prediction
from fewstep.diffusion.samplers import full
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit
from fewstep.methods.rollouts.grids import Exit, deepest, drawn, stops
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_calls < 1:
            raise ValueError(f"grad_calls must be at least 1, got {self.grad_calls}")

    @property
    def calls(self) -> float:
        return fmean(fmean(found) + 1 for found in stops(self.grids, self.exit))

    @property
    def work(self) -> float:
        graded = (fmean(min(stop + 1, self.grad_calls) for stop in found) for found in stops(self.grids, self.exit))
        return self.calls + 2 * fmean(graded)

    @property
    def fullest(self) -> Mapping[str, int]:
        """The longest grid with the last exit: it has most calls, and most of them with gradient."""
        return deepest(self.grids)

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid, stop = drawn(self.grids, self.exit, self.shift, rng)
        noise, before = rng.randn(batch.noise_shape, "noise"), list[Visit]()

        def call_student(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            with torch.set_grad_enabled(grad and call.step > stop - self.grad_calls):
                return student(x_t, t, batch.cond, call)

        x = student.path.prior(noise)
        for step in islice(self.sampler.sampling(call_student, x, (*grid, 0.0), rng=rng), stop):
            before.append(Visit(step.prediction.x0, step.prediction.x_t, step.prediction.t))
            x = step.x
        last = call_student(x, full(grid[stop], x), Call(step=stop, steps=len(grid)))
        with torch.set_grad_enabled(grad):
            return Rolled(last.x0, x, last.t, tuple(before), noise, exit=stop, grid=grid)
