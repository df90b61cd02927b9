"""Prepare a student of few steps: a head of its last blocks learns to make each of its predictions from noise, in a few runs.

Nie et al., Transition Matching Distillation for Fast Video Generation, 2601.09881: its first stage, TM-MeanFlow.

    1  x_t = noised clip;  y = what the network shall predict of it (the flow eps - x0);  y_1 ~ N(0, I);  y_s = (1 - s) y + s y_1
    2  s >= r;  r = s in most of the batch
    3  u(y_s, s, r) = y_1 - head(y_s, s, r; m(x_t, t, c))
    4  du/ds = [u(y_{s+d}, s + d, r) - u(y_{s-d}, s - d, r)] / 2d                                              (no gradient)
    5  goal = (y_1 - y) - (s - r) du/ds                                                                       (no gradient)
    6  minimise |u - goal|^2 / (sg|u - goal|^2 + c)

At r = s line 6 is flow matching of y. The head, and its runs in sampling, are the transform `FlowHead`, which this method gives
its student. The second stage is DMD2 with the same transform: its rollouts then have a gradient through all runs of the head
(DMD2-v: `mode: ode`, an adversary, scores at shifted times). u holds y_1, which the head does not see; so where y is not nearly
known from x_t, lines 3 to 6 alone give it too little variance, which the second stage must mend.

Not from the paper: any path and kind of prediction; the density of t, and s and r as the larger and the smaller of two uniform
numbers; d is cut off at s = 0 and 1; the backbone m is computed again for each of the calls of line 4. These two calls are made
without autocast, in the type of the weights, because the rounding of bfloat16 is about as large as their difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.compress import FlowHead, Transform
from fewstep.compress.flow_head import inside
from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Fraction, Positive, require_bounds
from fewstep.diffusion import TimeDensity, Uniform, target
from fewstep.diffusion.path import broadcast
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.flow_matching import drop
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class TransitionMatching(Method):
    """Transition matching distillation (TMD), first stage: mean flows."""

    cite: ClassVar[str] = "Nie et al., Transition Matching Distillation for Fast Video Generation, 2601.09881"

    head: FlowHead = FlowHead(blocks=5, steps=2)
    """H and N: blocks of the head, and its runs in every call (N2H5 of Wan's 30 blocks; N4H5 at 14B)."""
    flow: Fraction = 0.75
    """Share of the batch with r = s."""
    density: TimeDensity = Uniform()
    """Density of t."""
    cond_drop: Fraction = 0.1
    """Share of the prompts that are dropped, so that the student can be guided."""
    delta: Positive = 0.005
    """d: half the distance of the two calls of line 4."""
    scale: Positive = 1e-3
    """c: mean square, in units of y, below which an error counts less."""

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return (self.head,)

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        student, x0, d = nets.student, batch.require("x0"), self.delta
        eps, t = rng.randn(x0.shape, "eps").to(x0), self.density.sample(len(x0), rng)
        x_t, y = student.path.add_noise(x0, eps, t), target(student.kind, x0, eps, t, student.path)  # 1
        noise, cond = rng.randn(x0.shape, "inner").to(x0), drop(batch.cond, batch.uncond, self.cond_drop, rng)
        s, r = self.interval(len(x0), rng)  # 2

        def u(s: Tensor) -> Tensor:
            y_s = y + broadcast(s, y) * (noise - y)
            answer: Tensor = student(x_t, t, cond.with_extra(inside(y_s, s, r))).raw
            return noise - answer  # 3

        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            late, early = (s + d).clamp(max=1), (s - d).clamp(min=0)
            slope = (u(late) - u(early)) / broadcast(late - early, y)  # 4
            goal = (noise - y) - broadcast(s - r, y) * slope  # 5
        error = (u(s) - goal).square().flatten(1).mean(1)
        yield {"mean_flow": (error / (error.detach() + self.scale)).mean()}  # 6

    def interval(self, count: int, rng: Rng) -> tuple[Tensor, Tensor]:
        """s and r `[B]`."""
        r, s = rng.rand((count, 2), "interval").sort(1).values.unbind(1)
        return s, torch.where(rng.rand((count,), "flow") < self.flow, s, r)

    def cost(self) -> tuple[Work, ...]:
        return (Work("student", 3 + 2),)
