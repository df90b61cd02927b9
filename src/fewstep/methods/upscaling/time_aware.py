"""Distil a teacher that makes clips sharp into one step: its clip, its scores at small times, and a discriminator.

He et al., One Step Diffusion-based Super-Resolution with Time-Aware Distillation (TAD-SR), 2408.07476.

    repeat, with x_t = latents of the low-resolution clip, with the noise of time t:
    1    x = student(x_t, t, c)                                                 (no gradient)
    2    discriminator: sharp clips against x, at all times
    3  x = student(x_t, t, c)                                                   (gradient)
    4  y = guided teacher's sampler from the same x_t down to 0                 (no gradient)
    5  minimise regression * |x - y|^2
    6  g = eps_teacher(a x + s eps, u) - eps_teacher(a y + s eps, u),  u small;  put score * g on x
    7  + lambda_G * (the generator's loss of D)

Line 6 has one network, one noise and one time at two clips: where x = y, it is exactly 0, unlike score distillation against the
noise itself, whose bias blurs. At small times the two predictions differ by fine detail, and there is no critic to train.

The paper's teacher is a restorer (ResShift) that reads the low-resolution image in every step. A text-to-video teacher reads it
only as x_t (SDEdit, 2108.01073), so what it makes of high times t is another clip. With `teacher_steps: 0` the sharp clip itself
takes the teacher's place in lines 5 and 6, which the authors' code can do, too. Not from the paper: D is an `Adversary`, which
knows the time through the teacher's features; its real and generated clips have noise of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Losses, Rng
from fewstep.core.bounds import Amount, Natural, require_bounds
from fewstep.diffusion import CFG, DDIM, Prediction, TimeDensity, Uniform
from fewstep.methods import targets
from fewstep.methods.adversary import Adversary
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import FromLow, Rolled
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class TimeAwareDistillation(Method):
    """One-step super-resolution by the scores of a teacher's clip and of the student's (TAD-SR)."""

    cite: ClassVar[str] = (
        "He et al., One Step Diffusion-based Super-Resolution with Time-Aware Distillation, 2408.07476"
    )

    rollout: FromLow = FromLow(noise=None)
    """Where student and teacher begin: at the low-resolution clip, with noise."""
    teacher_steps: Natural = 15
    """Steps of the teacher in line 4 (paper: 15); 0: y is the sharp clip."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher, in its steps and in its scores."""
    regression: Amount = 1.0
    """Weight of line 5 (code: 1)."""
    score: Amount = 1.0
    """Weight of line 6 (code: 1)."""
    score_density: TimeDensity = Uniform(low=0.02, high=0.2)
    """Times u of line 6 (code: the lowest 3 of 15 steps)."""
    adversary: Adversary | None = Adversary(weight=0.02, loss="hinge", density=Uniform(low=0.02, high=0.98))
    """D, at all times (code: hinge, lambda_G = 0.02); null: none."""
    warmup: Natural = 0
    """First iterations, which train only D."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.adversary is not None:
            self.adversary.check_alone()
        elif self.warmup > 0:
            raise ValueError("warmup trains D alone, and adversary null is no D; write warmup: 0, or give an adversary")
        if self.regression == self.score == 0 and self.adversary is None:
            raise ValueError("regression 0, score 0 and adversary null leave no loss; set one of the three")
        if self.teacher_steps and self.rollout.grid.noise != self.rollout.time:
            raise ValueError(
                f"the teacher begins where the student does, and knows latents of time {self.rollout.time:g} with the noise of "
                f"that time, not of {self.rollout.grid.noise:g}; write rollout.noise: null, or teacher_steps: 0"
            )

    @property
    def needs(self) -> frozenset[str]:
        sharp = {"x0"} if self.adversary is not None or not self.teacher_steps else set()
        return frozenset({"prompts"} | sharp) | self.rollout.needs

    @property
    def critic(self) -> None:
        """None: a discriminator does not learn the student's distribution."""
        return None

    def aux(self) -> dict[str, Role]:
        return {} if self.adversary is None else self.adversary.roles

    def updates(self, step: int) -> Iterator[Update | Sync]:
        turns = [] if self.adversary is None else [Update(tuple(self.adversary.roles), self.discriminator_loss)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup)

    def discriminator_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("discriminator")
        assert self.adversary is not None
        x = self.rollout(nets.student, batch, rng, grad=False).x0  # 1
        yield self.adversary.discriminator_losses(nets, *self.adversary.pair(nets, batch, x, batch.cond, rng), rng)  # 2

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        rolled = self.rollout(nets.student, batch, rng, grad=True)  # 3
        x, y = rolled.x0, self.wanted(nets, batch, rolled, rng)  # 4
        losses = {"regression": self.regression * targets.mse(x, y)}  # 5
        if self.score > 0:
            losses["score"] = self.score * targets.toward(x, self.gap(nets, batch, x, y, rng))  # 6
        if self.adversary is not None:
            pair = self.adversary.pair(nets, batch, x, batch.cond, rng)
            losses["adversarial"] = self.adversary.student_loss(nets, *pair)  # 7
        yield losses

    @torch.no_grad()
    def wanted(self, nets: Nets, batch: Batch, rolled: Rolled, rng: Rng) -> Tensor:
        """y of line 4."""
        if not self.teacher_steps:
            clip: Tensor = batch.require("x0")
            return clip

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            return self.guidance(nets.teacher, x_t, t, batch.cond, batch.uncond, call)

        return DDIM()(denoise, rolled.x_t, self.rollout.grid.times(self.teacher_steps), rng=rng)

    @torch.no_grad()
    def gap(self, nets: Nets, batch: Batch, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        """g of line 6."""
        eps, u = rng.randn(x.shape, "eps").to(x.dtype), self.score_density.sample(len(x), rng)
        noised = (nets.teacher.path.add_noise(clip, eps, u) for clip in (x, y))
        mine, its = (self.guidance(nets.teacher, x_u, u, batch.cond, batch.uncond).eps for x_u in noised)
        return mine - its

    def cost(self) -> tuple[Work, ...]:
        turns = 0 if self.adversary is None else 1
        asked = self.guidance.passes * (self.teacher_steps + (2 if self.score > 0 else 0))
        teacher = (Work("teacher", asked),) if asked else ()
        judge = () if self.adversary is None else (self.adversary.work(1),)
        return Work("student", turns * self.rollout.calls + self.rollout.work), *teacher, *judge
