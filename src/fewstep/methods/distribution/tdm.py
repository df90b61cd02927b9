"""Match the student's distribution to the teacher's at every point of the student's own trajectory, not only at its end.

Luo et al., Learning Few-Step Diffusion Models by Trajectory Distribution Matching, 2503.06674.

    repeat critic_updates times:
    1    x_t = student's deterministic sampler up to a random step t             (no gradient)
    2    x = student(x_t, t);  x_s = where the step from t to s lands;  u in [s, t];  x_u = a x_s + b eps
    3    critic: minimise |critic(x_u, u) - E|^2, with E the target whose mean given x_u is the truth
    4  x_t, x, x_s, x_u as in lines 1 and 2                                      (gradient through x)
    5  g = (critic(x_u) - guided teacher(x_u)) / mean|x - guided teacher(x_u)|;  put g on x

Line 3: a regression on x would be wrong, because x_s is not noised x. The noise that was added from s to u is `b eps`, and
`- eps / b` is a score target from x_s alone; in noise and clean latents: `eps* = s_u / b eps`, `x0* = (x_u - s_u eps*) / a_u`
(for rectified flow, eq. 8 of Phased DMD, 2510.27684). It grows without bound as u goes to s, hence the weight min(1, 10 b^2).

Phased DMD (2510.27684) is this method with `interval: above` (u in [s, 1]), several critic updates, and a `rollout.phase`: only
the steps of a phase are trained, and s is its end. One stage of a recipe trains one phase, with a new critic, and one expert
of a student with the transform `Experts`; the experts of earlier phases only make the states where it begins.

Not from the paper: line 3, where it weighs a regression on x; the normaliser is DMD's mean and not a pseudo-Huber distance. Left
out: the number of steps as an input of student and critic (TDM-unify); with several grids one critic knows the landings of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Count, Fraction, Natural, Part, require_bounds
from fewstep.diffusion import CFG, NoisePath, from_x0
from fewstep.methods import targets
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.matching import Matching, Noised, ReverseKL, Scores
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import BackwardSimulation, Rolled
from fewstep.methods.rollouts.grids import latest_landing
from fewstep.methods.scorers import Scorers
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class TDM(Method):
    """Trajectory distribution matching (TDM; sparse: BLADE), and phased distribution matching distillation (Phased DMD)."""

    cite: ClassVar[str] = (
        "Luo et al., Learning Few-Step Diffusion Models by Trajectory Distribution Matching, 2503.06674"
    )

    rollout: BackwardSimulation = BackwardSimulation(mode="ode")
    """The student's sampler, which must be deterministic."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher; it is distilled into the student. The critic uses none."""
    scorers: Scorers = Scorers()
    """Teacher and critic, if they are other models than the student's, such as larger ones."""
    matching: Matching = ReverseKL()
    """How the difference of teacher and critic becomes a loss."""
    critic_updates: Count = 1
    """Critic updates per student update, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only the critic. It is new in each phase."""
    align: Part = 0.0
    """Share of the student's weights that the critic takes after each update of the student (SenseFlow: 0.03); 0: none."""
    interval: Literal["step", "above"] = "step"
    """Times of the comparison: those of the step, from where it lands to where it began, or all above where it lands."""
    low: Fraction = 0.02
    """Share of the interval next to the landing that is left out."""
    high: Fraction = 0.98
    """Latest time of the comparison, above all times at which steps land (published: 0.9, for a grid without shift)."""

    def __post_init__(self) -> None:
        require_bounds(self)
        self.matching.check(self.guidance)
        if self.rollout.mode != "ode":
            raise ValueError("TDM follows the student's deterministic trajectory; set rollout.mode to ode")
        if self.matching.judged:
            raise ValueError(f"{type(self.matching).__name__} reads a discriminator, and TDM has none")
        exact_weight = isinstance(self.matching, ReverseKL) and self.matching.weight == "exact"
        if self.matching.through or exact_weight:
            raise ValueError(
                "line 3 makes the critic know where steps land, and not the student's clips, which SiD, SIM and the KL's exact "
                "weight compare it with; give TDM matching: ReverseKL, with weight distance or one"
            )
        student = self.rollout
        if self.high <= (landed := latest_landing(student.grids, student.exit, student.shift, student.phase)):
            raise ValueError(
                f"a step of the rollout lands at {landed:.4f}, and high: {self.high:g} leaves no time above it; raise high"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"} | self.rollout.needs)

    def aux(self) -> dict[str, Role]:
        return self.scorers.roles

    def updates(self, step: int) -> Iterator[Update | Sync]:
        turns = [Update(("critic",), partial(self.critic_loss, k)) for k in range(self.critic_updates)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup, align=self.align)

    def critic_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"critic/{turn}")  # new samples in every turn
        with torch.no_grad():
            noised, s = self.noised(self.rollout(nets.student, batch, rng, grad=False), nets.critic.path, rng)  # 1, 2
        x0, eps, weight = unbiased(noised, s, nets.critic.path)
        yield {"denoising": targets.denoising(nets.critic(noised.x_t, noised.t, batch.cond), x0, eps, weight)}  # 3

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        noised, _ = self.noised(self.rollout(nets.student, batch, rng, grad=True), nets.teacher.path, rng)  # 4
        scores = Scores(nets[self.scorers.role], nets.critic, self.guidance, batch.cond, batch.uncond)
        yield {"matching": self.matching.loss(noised, scores)}  # 5

    def noised(self, rolled: Rolled, path: NoisePath, rng: Rng) -> tuple[Noised, Tensor]:
        """The state where the student's last step lands, with noise; and the time s of that state, `[B]`."""
        landed = self.rollout.landing(rolled)
        t, s = rolled.t, torch.full_like(rolled.t, landed)
        x_s = from_x0(rolled.x0, rolled.x_t, t, path).step_to(s)
        top = (t if self.interval == "step" else torch.ones_like(t)).clamp_max(self.high)
        share = self.low + (1 - self.low) * rng.rand((len(t),), "time").to(t)
        u, eps = s + (top - s) * share, rng.randn(x_s.shape, "eps")
        a, b = path.between(s, u, x_s)
        return Noised(rolled.x0, a * x_s + b * eps, u, eps, self.matching.guided_at(x_s, path, s, t, rng)), s

    def cost(self) -> tuple[Work, ...]:
        turns, back = self.critic_updates, self.matching.backward
        student = Work("student", turns * self.rollout.calls + self.rollout.work)
        return (
            student,
            Work(self.scorers.role, self.matching.teacher_calls(self.guidance)),
            Work("critic", 3 * turns + 1 + back),
        )


def unbiased(noised: Noised, s: Tensor, path: NoisePath) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents and noise to regress on at a state that was noised from time s, and the weight, `[B]`: line 3."""
    _, b = path.between(s, noised.t, noised.x_t)
    c = path.at(noised.t, noised.x_t)
    eps = c.s / b * noised.eps
    return (noised.x_t - c.s * eps) / c.a, eps, (10 * b.square()).clamp_max(1).flatten()
