"""Halve the number of steps, again and again: one student step learns two steps of the model before it.

Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2202.00512, algorithm 2.

    for N in stages:
    1    stage <- student                                   (first stage: the guided teacher)
    2    i ~ {1..N}; u, m, s = the times i/N, (i - 1/2)/N, (i - 1)/N
    3    x_u = a_u x0 + s_u eps
    4    x_m = DDIM(stage, x_u, u -> m); x_s = DDIM(stage, x_m, m -> s)         (`factor` such steps from u to s)
    5    target = (x_s - (s_s/s_u) x_u) / (a_s - (s_s/s_u) a_u)       so that one DDIM step u -> s lands on x_s
         at s = 0: the x0 prediction of the last step
    6    minimise max(a_u^2/s_u^2, 1) |student(x_u, u, c) - target|^2

Not from the paper: the first stage distils guidance too (Meng et al., 2210.03142, use a separate stage); the grid may be
shifted; any path. The optimiser is not restarted in each stage, and its learning rate is not annealed there. With `history`
MovingBuffer each part of a clip has a step i of its own, and one stage with a larger `factor` is the multistep distillation of
StreamDiT (2507.03745): the student learns the guided teacher's way through each of N segments of noise in one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Bounds, Count, Natural, Positive, require_bounds
from fewstep.diffusion import CFG, DDIM, Contract, NoisePath, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.histories import DiffusionForced, History, WholeClip
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
    factor: Annotated[int, Bounds(2, 10_000)] = 2
    """Steps of the model before that one step of the student learns."""
    history: History = WholeClip()
    """What is read of other chunks, for a student and a teacher that stream (`MovingBuffer`)."""

    def __post_init__(self) -> None:
        require_bounds(self)
        counts = [n for n, _ in self.stages]
        if not counts or counts[-1] < 1 or any(a != self.factor * b for a, b in pairwise(counts)):
            part = "half" if self.factor == 2 else f"1/{self.factor} of"
            raise ValueError(f"each stage must have {part} the steps of the one before, got {counts}")
        if isinstance(self.history, DiffusionForced) and self.history.clean:
            raise ValueError("chunks without noise have no step that could be learned; write history.clean: 0")
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
        yield Update(("student",), partial(self.student_loss, self.stages[index][0], self.guidance_in(index)))

    def stage(self, step: int) -> tuple[int, int]:
        """Number and first iteration of the stage that iteration `step` belongs to."""
        index, start = 0, 0
        while index < len(self.stages) - 1 and step >= start + self.stages[index][1]:
            start, index = start + self.stages[index][1], index + 1
        return index, start

    def guidance_in(self, index: int) -> CFG:
        """That of the stage's model: from the second stage on it is a student, which has learnt it."""
        return self.guidance if index == 0 else CFG()

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
        (x_u, u, x, s, last), path = self.walk(steps, guidance, nets, batch, rng), nets.student.path
        target = torch.where(broadcast(s, x) == 0, last, landing(x_u, u, x, s, path))  # 5
        snr = path.log_snr(u).exp().to(x.dtype)
        student = self.history.over(nets.student, batch.require("x0"))
        yield {"halving": mse(student(x_u, u, batch.cond).x0, target, snr.clamp_min(1))}  # 6

    @torch.no_grad()
    def walk(self, steps: int, guidance: CFG, nets: Nets, batch: Batch, rng: Rng) -> tuple[Tensor, ...]:
        """The way of the stage's model from `x_u`, a noised clip at times u of the student's grid, to `x_s` at the next times s,
        where its last prediction was x0: these five."""
        x0 = batch.require("x0")
        fine, stage = uniform_grid(self.factor * steps, self.shift), self.history.over(nets.stage, x0)
        i = self.factor * self.history.index(steps, x0, rng)
        u, *between = (pick(fine, i + k, x0) for k in range(self.factor + 1))  # 2
        x_u = x = nets.student.path.add_noise(x0, rng.randn(x0.shape, "eps"), u)  # 3
        for t, s in pairwise((u, *between)):
            made = guidance(stage, x, t, batch.cond, batch.uncond)
            x = made.step_to(s)  # 4
        return x_u, u, x, s, made.x0

    def contract(self, teacher: Contract) -> Contract:
        return self._contract(teacher, self.stages[-1][0])

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        return self._contract(teacher, self.stages[self.stage(step)[0]][0])

    def _contract(self, teacher: Contract, steps: int) -> Contract:
        return self.history.contract(student_contract(teacher, (uniform_grid(steps)[:-1],), self.shift, DDIM()))

    def cost(self) -> tuple[Work, ...]:
        total, calls = sum(n for _, n in self.stages), self.history.calls
        guided = self.stages[0][1] / total * (self.guidance.passes - 1)
        return Work("student", 3 * calls), Work("stage", self.factor * (1 + guided) * calls)


def landing(x_u: Tensor, u: Tensor, x_s: Tensor, s: Tensor, path: NoisePath) -> Tensor:
    """The x0 prediction at `(x_u, u)` whose DDIM step to `s` lands on `x_s`: line 5, the DDIM step inverted."""
    here, there = path.at(u, x_u), path.at(s, x_u)
    ratio = there.s / here.s
    return (x_s - ratio * x_u) / (there.a - ratio * here.a)
