"""Halve the number of steps, again and again: one student step learns two steps of the model before it.

Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2202.00512, algorithm 2.

    for N in stages:
    1    stage <- student                                   (first stage: the guided teacher)
    2    i ~ {1..N}; u, m, s = the times i/N, (i - 1/2)/N, (i - 1)/N
    3    x_u = a_u x0 + s_u eps
    4    x_m = DDIM(stage, x_u, u -> m); x_s = DDIM(stage, x_m, m -> s)
    5    target = (x_s - (s_s/s_u) x_u) / (a_s - (s_s/s_u) a_u)       so that one DDIM step u -> s lands on x_s
         at s = 0: the x0 prediction of the second step
    6    minimise max(a_u^2/s_u^2, 1) |student(x_u, u, c) - target|^2

Not from the paper: the first stage distils guidance too (Meng et al., 2210.03142, use a separate stage); the grid may be
shifted; any path. The optimiser is not restarted in each stage, and its learning rate is not annealed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Count, Natural, Positive, require_bounds
from fewstep.diffusion import CFG, DDIM, Contract, NoisePath, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.roles import Copy, Role
from fewstep.methods.rollouts import pick, student_contract
from fewstep.methods.targets import mse
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    """Progressive distillation. The student of the last stage is the result; it serves that step count only."""

    cite: ClassVar[str] = "Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2202.00512"

    stages: tuple[tuple[Count, Natural], ...] = ((8, 400), (4, 400), (2, 400), (1, 400))
    """Stages in order, each (student steps N, iterations). The last stage continues if the run is longer."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher in the first stage; the student learns it, so later stages use none."""
    shift: Positive = 1.0
    """Shift of the time grid; 1: none."""

    def __post_init__(self) -> None:
        require_bounds(self)
        counts = [n for n, _ in self.stages]
        if not counts or counts[-1] < 1 or any(a != 2 * b for a, b in pairwise(counts)):
            raise ValueError(f"each stage must have half the steps of the one before, got {counts}")
        if empty := [n for n, length in self.stages if length < 1]:
            raise ValueError(
                f"stages: the stage of {empty[0]} steps has no iterations, so it would train nothing; give it at least 1 "
                "iteration, or leave it out (only the first stage is guided)"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Role]:
        return {"stage": Copy("teacher")}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        index, start = self.stage(step)
        if index > 0 and step == start:
            yield Sync("stage", "student")  # 1
        guidance = self.guidance if index == 0 else CFG()
        yield Update(("student",), partial(self.student_loss, self.stages[index][0], guidance))

    def stage(self, step: int) -> tuple[int, int]:
        """Number and first iteration of the stage that iteration `step` belongs to."""
        index, start = 0, 0
        while index < len(self.stages) - 1 and step >= start + self.stages[index][1]:
            start, index = start + self.stages[index][1], index + 1
        return index, start

    def check(self, steps: int) -> None:
        before = sum(length for _, length in self.stages[:-1])
        if steps <= before:
            raise ValueError(
                f"settings.steps is {steps}, but the last stage (the student of {self.stages[-1][0]} steps) begins after "
                f"{before} iterations; give it {sum(n for _, n in self.stages)}, or at least {before + 1}, or shorten stages"
            )

    def lengthened(self, factor: float) -> Self:
        return replace(self, stages=tuple((n, max(1, int(length * factor))) for n, length in self.stages))

    def student_loss(self, steps: int, guidance: CFG, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x0, path, fine = batch.require("x0"), nets.student.path, uniform_grid(2 * steps, self.shift)
        i = 2 * rng.integers((len(batch),), "index", steps)
        u, m, s = (pick(fine, i + k, x0) for k in (0, 1, 2))  # 2
        x_u = path.add_noise(x0, rng.randn(x0.shape, "eps"), u)  # 3
        with torch.no_grad():
            x_m = guidance(nets.stage, x_u, u, batch.cond, batch.uncond).step_to(m)  # 4
            second = guidance(nets.stage, x_m, m, batch.cond, batch.uncond)
            target = landing(x_u, u, second.step_to(s), s, path)  # 5
            target = torch.where(broadcast(s, x0) == 0, second.x0, target)
        snr = path.log_snr(u).exp().to(x0.dtype)
        yield {"halving": mse(nets.student(x_u, u, batch.cond).x0, target, snr.clamp_min(1))}  # 6

    def contract(self, teacher: Contract) -> Contract:
        return student_contract(teacher, (uniform_grid(self.stages[-1][0])[:-1],), self.shift, DDIM())

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        return student_contract(teacher, (uniform_grid(self.stages[self.stage(step)[0]][0])[:-1],), self.shift, DDIM())

    def cost(self) -> tuple[Work, ...]:
        total = sum(n for _, n in self.stages)
        guided = self.stages[0][1] / total * (self.guidance.passes - 1)
        return Work("student", 3), Work("stage", 2 + 2 * guided)


def landing(x_u: Tensor, u: Tensor, x_s: Tensor, s: Tensor, path: NoisePath) -> Tensor:
    """The x0 prediction at `(x_u, u)` whose DDIM step to `s` lands on `x_s`: line 5, the DDIM step inverted."""
    here, there = path.at(u, x_u), path.at(s, x_u)
    ratio = there.s / here.s
    return (x_s - ratio * x_u) / (there.a - ratio * here.a)
