"""Two neighbouring points of a teacher's ODE trajectory must have the same endpoint.

Luo et al., Latent Consistency Models, 2310.04378, algorithm 1; Song et al., Consistency Models, 2303.01469.

    1  n drawn on a grid of N intervals; x_t = a x0 + s eps at t = t_n
    2  x_s = DDIM(guided teacher, x_t, t_n -> t_{n-k})
    3  minimise d(f(x_t, t_n, c), stop f_target(x_s, t_{n-k}, c)),    f(x, 0) = x
    4  target <- mu target + (1 - mu) student

f is the x0 prediction; at t = 0 it must be the identity. Flow and v prediction fulfil this, so c_skip and c_out are not needed.
Not from the papers: fixed guidance instead of w-conditioning; the grid may be shifted; any path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Bounds, Count, Fraction, Positive, require_bounds
from fewstep.diffusion import CFG, Contract, Renoise, uniform_grid
from fewstep.diffusion.path import broadcast
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.histories import History, WholeClip
from fewstep.methods.rewards import Feedback
from fewstep.methods.roles import Copy, Role
from fewstep.methods.rollouts import pick, student_contract
from fewstep.methods.targets import pseudo_huber
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class Consistency(Method):
    """Latent consistency distillation."""

    cite: ClassVar[str] = "Luo et al., Latent Consistency Models, 2310.04378"

    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher's ODE step (the paper's omega + 1); it is distilled into the student."""
    intervals: Annotated[int, Bounds(1, 10_000)] = 48
    """N: number of intervals of the time grid."""
    skip: Count = 1
    """k: intervals per teacher step."""
    decay: Fraction = 0.95
    """mu: decay of the target network."""
    shift: Positive = 1.0
    """Shift of the grid for training and sampling; 1: none."""
    huber: Positive = 1e-3
    """c of the pseudo-Huber distance d."""
    steps: tuple[Count, ...] = (1, 2, 4)
    """Step counts that the student serves; training does not depend on them. Each must divide `intervals`, otherwise its
    times are not on the training grid."""
    history: History = WholeClip()
    """What is read of earlier chunks, for a student and a teacher that stream (causal consistency, 2605.15141)."""
    feedback: Feedback | None = None
    """The gradient of a reward of the student's prediction (T2V-Turbo, 2405.18750); null: none."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not 1 <= self.skip <= self.intervals:
            raise ValueError(f"skip must lie in [1, intervals={self.intervals}], got {self.skip}")
        trained = [n for n in range(1, self.intervals + 1) if self.intervals % n == 0]
        if not self.steps or not set(self.steps) <= set(trained):
            raise ValueError(
                f"steps: got {list(self.steps)}, and with {self.intervals} intervals the student is trained only for "
                f"{', '.join(map(str, trained))} steps; choose from these, or give another number of intervals"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"} | (self.feedback.needs if self.feedback else set()))

    def aux(self) -> dict[str, Role]:
        return {"target": Copy("student"), **(self.feedback.roles if self.feedback else {})}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        yield Update(("student",), self.student_loss)
        yield Sync("target", "student", self.decay)  # 4

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        x0, grid = batch.require("x0"), uniform_grid(self.intervals, self.shift)
        n = self.history.index(self.intervals, x0, rng)
        student, teacher, target_net = (self.history.over(net, x0) for net in (nets.student, nets.teacher, nets.target))
        t, s = pick(grid, n, x0), pick(grid, (n + self.skip).clamp_max(self.intervals), x0)
        x_t = student.path.add_noise(x0, rng.randn(x0.shape, "eps"), t)  # 1
        with torch.no_grad():
            real = self.guidance(teacher, x_t, t, batch.cond, batch.uncond)
            target = target_net(real.step_to(s), s, batch.cond).x0  # 2
            target = torch.where(broadcast(s, x0) == 0, real.x0, target)  # f(x, 0) = x
        made = student(x_t, t, batch.cond).x0
        losses = {"consistency": pseudo_huber(made, target, self.huber)}  # 3
        yield losses | ({"reward": self.feedback.loss(made, batch, nets, rng)} if self.feedback else {})

    def contract(self, teacher: Contract) -> Contract:
        grids = tuple(uniform_grid(n)[:-1] for n in self.steps)
        return self.history.contract(student_contract(teacher, grids, self.shift, Renoise()))

    def cost(self) -> tuple[Work, ...]:
        calls = self.history.calls
        return Work("student", 3 * calls), Work("teacher", self.guidance.passes * calls), Work("target", calls)
