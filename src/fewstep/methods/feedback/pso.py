"""Make the better of two outcomes of the student's own sampling steps more likely, without losing few-step sampling.

Miao et al., Tuning Timestep-Distilled Diffusion Models Using Pairwise Sample Optimization, 2410.03190. A step of the student's
sampler from t to s is a draw from `N(m, sd^2 I)`, `m = a_s x`, with the student's prediction x; `m_ref` is the same of a frozen
copy of the student as it began.

    offline, from data x0:
    1    x_t = noised x0, at a random time t of the student's grid
    2    y_w = a_s x0 + sd eps,  y_l = m_ref + sd eps
    online, with a reward:
    1    x_t = student's sampler up to a random step t                          (no gradient)
    2    y_1 .. y_k drawn from the student's step;  y_w is the best by the reward, y_l the worst
    3  minimise -log sigmoid(beta / (2 sd^2) (|y_w - m_ref|^2 - |y_w - m|^2 - |y_l - m_ref|^2 + |y_l - m|^2))

With k > 2 the online form is stage 2 of Flash-DMD (2511.20549), which takes turns with distillation: `Alternating`. Not from the
papers, or not known: norms are means over elements, so beta does not depend on the size of clips; offline pairs share x_t and
eps; in the sampler's last step, which is not random, `temperature` is sd; a candidate's reward is that of the clip that the
student predicts from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Bounds, Positive, require_bounds
from fewstep.diffusion.samplers import full
from fewstep.methods import targets
from fewstep.methods.base import Method, Nets, Update
from fewstep.methods.feedback.random_step import RandomStep, predicted, require_random
from fewstep.methods.rewards import Reward
from fewstep.methods.roles import Copy, Role
from fewstep.methods.rollouts import BackwardSimulation
from fewstep.methods.rollouts.grids import drawn
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class PSO(Method):
    """Pairwise sample optimization of a student that has been distilled."""

    cite: ClassVar[str] = (
        "Miao et al., Tuning Timestep-Distilled Diffusion Models Using Pairwise Sample Optimization, 2410.03190"
    )
    reinforces: ClassVar[bool] = True

    rollout: BackwardSimulation = BackwardSimulation()
    """The student's sampler, as it was distilled; its steps must be random."""
    reward: Reward | None = None
    """Ranks outcomes of a step; null: offline, clips of the data against the student's own."""
    candidates: Annotated[int, Bounds(2, 64)] = 2
    """k: outcomes of which the best and the worst are compared, with a reward."""
    beta: Positive = 1000.0
    """beta of line 3: how strongly the student is held to what it was. Published for sums or means: about 1000 (unverified)."""
    temperature: Positive = 0.25
    """sd of the last step, in units of the latents."""

    def __post_init__(self) -> None:
        require_bounds(self)
        require_random(self.rollout)
        if self.reward is None and self.candidates != 2:
            raise ValueError(f"candidates is {self.candidates}, and without a reward none are drawn; leave it at 2")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"} | ({"x0"} if self.reward is None else self.reward.needs))

    def aux(self) -> dict[str, Role]:
        return {"reference": Copy("student", frozen=True), **(self.reward.roles if self.reward is not None else {})}

    def updates(self, step: int) -> Iterator[Update]:
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        step, x0 = self.noised(nets, batch, rng) if self.reward is None else self.reached(nets, batch, rng)  # 1
        with torch.no_grad():
            reference = step.x0(nets.reference, batch)
        if self.reward is None:
            eps = rng.randn(x0.shape, "outcome")
            win, lose = step.outcome(batch.require("x0"), eps), step.outcome(reference, eps)  # 2
        else:
            win, lose = self.ranked(step, x0, self.reward, nets, batch, rng)  # 2
        scale = self.beta / step.deviation.flatten().square()
        yield {"preference": targets.preference(win, lose, step.signal * x0, step.signal * reference, scale)}  # 3

    def noised(self, nets: Nets, batch: Batch, rng: Rng) -> tuple[RandomStep, Tensor]:
        """A step from noised clips of the data, and the student's prediction."""
        x0, path = batch.require("x0"), nets.student.path
        grid, index = drawn(self.rollout.grids, self.rollout.exit, self.rollout.shift, rng, self.rollout.span)
        x_t = path.add_noise(x0, rng.randn(x0.shape, "noise"), full(grid[index], x0))
        step = RandomStep.at(x_t, grid, index, path, self.temperature, rng)
        return step, step.x0(nets.student, batch)

    def reached(self, nets: Nets, batch: Batch, rng: Rng) -> tuple[RandomStep, Tensor]:
        """A step from where the student's sampler has come, and the student's prediction."""
        rolled = self.rollout(nets.student, batch, rng, grad=True)
        step = RandomStep.at(rolled.x_t, rolled.grid, rolled.exit, nets.student.path, self.temperature, rng)
        return step, rolled.x0

    def ranked(
        self, step: RandomStep, x0: Tensor, reward: Reward, nets: Nets, batch: Batch, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """The best and the worst of k outcomes."""
        outcomes, scores = step.candidates(self.candidates, x0, reward, nets, batch, rng)
        rows = torch.arange(len(x0), device=x0.device)
        return outcomes[scores.argmax(0), rows], outcomes[scores.argmin(0), rows]

    def cost(self) -> tuple[Work, ...]:
        own = 3 if self.reward is None else self.rollout.work + predicted(self.rollout, self.candidates)
        return Work("student", own), Work("reference", 1)
