"""Match the mean of clean clips given a noisy one, along the student's own sampling steps.

Salimans et al., Multistep Distillation of Diffusion Models via Moment Matching, 2406.04103, algorithm 2 (alternating).

    repeat critic_updates times, and lines 1 and 2 once more before line 4:
    1    t, x_t = noised clip;  s = a random time between t and one student step below
    2    x = student(x_t, t);  x_s = where the step from t to s lands
    3    critic: minimise |x - critic(x_s)|^2 + |guided teacher(x_s) - critic(x_s)|^2       (no gradient in x)
    4  student: minimise x . (critic(x_s) - guided teacher(x_s))                              (no gradient in x_s)

The best critic lies in the middle between the student's mean and the teacher's, so line 4 follows half of their difference. It is
zero if x is a sample of the clean clips given x_t, and not if it is their mean: the student learns to sample.

Not from the paper, or not known: the deterministic step in line 2 in place of the ancestral one; weights are 1 in clean latents;
line 4 is divided by DMD's distance. Left out: the paper's other algorithm, which has no critic and matches in parameter space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Count, Natural, Positive, require_bounds
from fewstep.diffusion import CFG, DDIM, Contract, shifted, uniform_grid
from fewstep.methods import targets
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import student_contract
from fewstep.methods.scorers import Scorers
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work

LEAST = 1e-3
"""Smallest s. At 0 the clean clip is known, and there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class MomentMatching(Method):
    """Multistep moment matching with a critic."""

    cite: ClassVar[str] = "Salimans et al., Multistep Distillation of Diffusion Models via Moment Matching, 2406.04103"

    steps: tuple[Count, ...] = (4,)
    """k: step counts that the student serves; each sample belongs to one. The paper trains 2, 4 and 8; one step is weak."""
    shift: Positive = 1.0
    """Shift of the time grid; 1: none."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher; it is distilled into the student. The critic uses none."""
    scorers: Scorers = Scorers()
    """Teacher and critic, if they are other models than the student's, such as larger ones."""
    critic_updates: Count = 1
    """Critic updates per student update, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only the critic."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not self.steps:
            raise ValueError("steps is empty; give at least one number of steps, such as (4,)")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"})

    def aux(self) -> dict[str, Role]:
        return self.scorers.roles

    def updates(self, step: int) -> Iterator[Update | Sync]:
        turns = [Update(("critic",), partial(self.critic_loss, k)) for k in range(self.critic_updates)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup)

    def critic_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        with torch.no_grad():
            x, x_s, s = self.stepped(nets, batch, rng.fold(f"critic/{turn}"))
            real = self.guidance(nets[self.scorers.role], x_s, s, batch.cond, batch.uncond).x0
        fake = nets.critic(x_s, s, batch.cond).x0
        yield {"moments": targets.mse(fake, x) + targets.mse(fake, real)}  # 3

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x, x_s, s = self.stepped(nets, batch, rng.fold("student"))
        with torch.no_grad():
            real = self.guidance(nets[self.scorers.role], x_s, s, batch.cond, batch.uncond).x0
            fake = nets.critic(x_s, s, batch.cond).x0
        yield {"matching": targets.distribution_matching(x, real, fake)}  # 4

    def stepped(self, nets: Nets, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """The student's clip x, the state x_s (without gradient) where its step lands, and the time s, `[B]`."""
        x0 = batch.require("x0")
        steps = torch.tensor(self.steps, device=x0.device)[rng.integers((len(batch),), "steps", len(self.steps))]
        start = rng.rand((len(batch),), "time").to(x0)
        end = (start - rng.rand((len(batch),), "length").to(x0) / steps).clamp_min(LEAST).minimum(start)
        t, s = shifted(start, self.shift), shifted(end, self.shift)
        made = nets.student(nets.student.path.add_noise(x0, rng.randn(x0.shape, "eps"), t), t, batch.cond)  # 1
        return made.x0, made.step_to(s).detach(), s  # 2

    def contract(self, teacher: Contract) -> Contract:
        return student_contract(teacher, tuple(uniform_grid(n)[:-1] for n in self.steps), self.shift, DDIM())

    def cost(self) -> tuple[Work, ...]:
        turns = self.critic_updates
        return (
            Work("student", turns + 3),
            Work(self.scorers.role, (turns + 1) * self.guidance.passes),
            Work("critic", 3 * turns + 1),
        )
