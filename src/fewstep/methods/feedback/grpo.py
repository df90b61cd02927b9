"""Make outcomes of the student's own sampling steps more likely if they are better than others of the same step.

Shao et al., DeepSeekMath (GRPO), 2402.03300, on steps of a sampler as in Flow-GRPO (2505.05470) and DMDR (2511.13649). A step of
the student's sampler from t to s is a draw from `N(m, sd^2 I)`, `m = a_s x`, with a network's prediction x.

    every `refresh` iterations:
    1    old <- student
    2  x_t = old student's sampler up to a random step t                        (no gradient)
    3  y_1 .. y_k drawn from the old student's step;  r_i = reward of y_i
    4  A_i = (r_i - mean r) / (std r + 1e-6)
    5  rho_i = p(y_i | student) / p(y_i | old) = exp((|y_i - m_old|^2 - |y_i - m|^2) / (2 sd^2))
    6  minimise -mean_i min(rho_i A_i, clamp(rho_i, 1 - clip, 1 + clip) A_i)

It needs an anchor, such as distribution matching beside it (DMDR): `Alternating`. Not from the papers: no divergence from a
reference; norms are means over elements, as in the code of Flow-GRPO; one step is trained at a time, from a candidate's predicted
clip; in the sampler's last step, which is not random, `temperature` is sd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Bounds, Count, Part, Positive, require_bounds
from fewstep.methods import targets
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.feedback.random_step import RandomStep, predicted, require_random
from fewstep.methods.rewards import Reward, WorldReward
from fewstep.methods.roles import Copy, Role
from fewstep.methods.rollouts import BackwardSimulation
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """Group relative policy optimization of a student that has been distilled."""

    cite: ClassVar[str] = "Shao et al., DeepSeekMath, 2402.03300; on sampling steps: Liu et al., Flow-GRPO, 2505.05470"
    reinforces: ClassVar[bool] = True

    rollout: BackwardSimulation = BackwardSimulation()
    """The student's sampler, as it was distilled; its steps must be random."""
    reward: Reward = WorldReward()
    """What is to be increased."""
    candidates: Annotated[int, Bounds(2, 64)] = 4
    """k: outcomes of a step, which are compared with each other."""
    clip: Part = 0.01
    """How far the likelihood of an outcome may move before it is left alone. Means over elements move little: 0.0001 to 0.2."""
    refresh: Count = 4
    """Updates of the student with candidates of one old student."""
    temperature: Positive = 0.25
    """sd of the last step, in units of the latents."""

    def __post_init__(self) -> None:
        require_bounds(self)
        require_random(self.rollout)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"} | self.reward.needs)

    def aux(self) -> dict[str, Role]:
        return {"old": Copy("student"), **self.reward.roles}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        if step % self.refresh == 0:
            yield Sync("old", "student")  # 1
        yield Update(("student",), self.student_loss)

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rolled = self.rollout(nets.old, batch, rng, grad=False)  # 2
        step = RandomStep.at(rolled.x_t, rolled.grid, rolled.exit, nets.old.path, self.temperature, rng)
        outcomes, r = step.candidates(self.candidates, rolled.x0, self.reward, nets, batch, rng)  # 3
        better = (r - r.mean(0)) / (r.std(0, correction=0) + 1e-6)  # 4
        x0 = step.x0(nets.student, batch)
        yield {"policy": targets.clipped_policy(log_ratio(step, outcomes, x0, rolled.x0), better, self.clip)}  # 5, 6

    def cost(self) -> tuple[Work, ...]:
        return Work("student", 3 + predicted(self.rollout, self.candidates)), Work("old", self.rollout.calls)


def log_ratio(step: RandomStep, outcomes: Tensor, x0: Tensor, old: Tensor) -> Tensor:
    """log rho of outcomes `[K, B, C, F, H, W]`, `[K, B]`, for predictions of the student and of the old one: line 5, whose
    difference of squares is written so that it loses no digits."""
    mean, before = step.signal * x0, step.signal * old
    each = (mean - before) * (2 * outcomes - mean - before) / (2 * step.deviation.square())
    return each.flatten(2).mean(2)
