"""Backward simulation: the student is trained on what its own sampler makes of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Rng
from fewstep.diffusion import Prediction
from fewstep.diffusion.samplers import full
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit
from fewstep.methods.rollouts.grids import exact
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class BackwardSimulation(Rollout):
    """The student's own sampler up to an exit step (2405.14867, section 4.5); the call at the exit has gradient.

    With several grids, each rollout first draws a grid and then the exit. So a student that serves several step counts sees, at
    each time, the inputs that all its samplers give it. `grids=((1.0,),)` is one step, from pure noise to clean latents.
    """

    exit: Literal["random", "last"] = "random"
    """Step to stop at: a random one or the last. All processes draw the same step, because they must agree on the number of
    calls."""

    grad_calls: int = 1
    """Number of last calls that carry gradient; the gradient flows from one call to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_calls < 1:
            raise ValueError(f"grad_calls must be at least 1, got {self.grad_calls}")

    @property
    def calls(self) -> float:
        return fmean(fmean(stops) + 1 for stops in self._stops)

    @property
    def work(self) -> float:
        return self.calls + 2 * fmean(fmean(min(stop + 1, self.grad_calls) for stop in stops) for stops in self._stops)

    @property
    def fullest(self) -> Mapping[str, int]:
        """The longest grid with the last exit: it has most calls, and most of them with gradient."""
        lengths = [len(grid) for grid in self.grids]
        return {"grid": lengths.index(max(lengths)), "exit": max(lengths) - 1}

    @property
    def _stops(self) -> list[range]:
        """The exits of each grid."""
        return [range(0 if self.exit == "random" else len(g) - 1, len(g)) for g in self.grids]

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        grid = exact(self.grids, self.shift)[rng.integer("grid", len(self.grids))]
        stop = rng.integer("exit", len(grid)) if self.exit == "random" else len(grid) - 1
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
