"""Take turns of distillation and reinforcement on one student, so that each holds the other in check.

Chen et al., Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation and Joint Reinforcement
Learning, 2511.20549, stage 2; DMDR, 2511.13649.

    1  one iteration of `distillation`
    2  `ratio` iterations of `reinforcement`, on the same student
    3  from line 1

Flash-DMD reinforces with `PSO` and a reward, DMDR may do so with `GRPO`. DMDR takes both in one step, which for a reward with a
gradient is `DMD2(feedback=...)`. Not from the papers: which of the two begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from fewstep.compress import Transform
from fewstep.core.bounds import Count, require_bounds
from fewstep.diffusion import CFG, Contract
from fewstep.methods.base import Method, Sync, Update
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.feedback.pso import PSO
from fewstep.methods.rewards import WorldReward
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import Rollout
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class Alternating(Method):
    """Distillation and reinforcement by turns (Flash-DMD's stage 2, DMDR)."""

    cite: ClassVar[str] = "Chen et al., Flash-DMD (stage 2), 2511.20549"
    reinforces: ClassVar[bool] = True

    distillation: Method = DMD2()
    """What keeps the student near its teacher."""
    reinforcement: Method = PSO(reward=WorldReward(), candidates=4)
    """What moves it to a larger reward. The student must be sampled alike in both."""
    ratio: Count = 5
    """Iterations of `reinforcement` after each one of `distillation`."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if (
            not self.reinforcement.reinforces
            or self.distillation.reinforces
            or isinstance(self.reinforcement, Alternating)
        ):
            raise ValueError(
                "reinforcement is a method that improves a distilled student, such as PSO or GRPO, and distillation one that "
                f"makes it; got {type(self.reinforcement).__name__} and {type(self.distillation).__name__}"
            )
        if self.distillation.part != "denoiser":
            raise ValueError(
                f"distillation: {type(self.distillation).__name__} trains the {self.distillation.part}, and reinforcement the "
                "denoiser; take a method that distils, such as DMD2"
            )
        both = [method.contract(Contract()) for method in (self.distillation, self.reinforcement)]
        if both[0] != both[1]:
            raise ValueError(
                "distillation and reinforcement train one student, which is sampled in one way; give both rollouts the same "
                "grids, shift and mode"
            )
        mine, its = self.distillation.aux(), self.reinforcement.aux()
        if twice := [role for role in mine.keys() & its.keys() if mine[role] != its[role]]:
            raise ValueError(
                f"distillation and reinforcement each have a {min(twice)} of their own; choose other methods"
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.distillation.needs | self.reinforcement.needs

    @property
    def guidance(self) -> CFG | None:
        return self.distillation.guidance

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return self.distillation.rollouts + self.reinforcement.rollouts

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return tuple(dict.fromkeys((*self.distillation.transforms, *self.reinforcement.transforms)))

    def aux(self) -> dict[str, Role]:
        return {**self.distillation.aux(), **self.reinforcement.aux()}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        round, turn = divmod(step, self.ratio + 1)
        if turn == 0:
            yield from self.distillation.updates(round)  # 1
        else:
            yield from self.reinforcement.updates(round * self.ratio + turn - 1)  # 2

    def check(self, steps: int) -> None:
        distilled = -(-steps // (self.ratio + 1))
        self.distillation.check(distilled)
        self.reinforcement.check(steps - distilled)

    def contract(self, teacher: Contract) -> Contract:
        return self.distillation.contract(teacher)

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        return self.distillation.contract_at(teacher, step // (self.ratio + 1))

    def lengthened(self, factor: float) -> Self:
        return replace(
            self, distillation=self.distillation.lengthened(factor), reinforcement=self.reinforcement.lengthened(factor)
        )

    def cost(self) -> tuple[Work, ...]:
        share = 1 / (self.ratio + 1)
        parts = ((self.distillation, share), (self.reinforcement, 1 - share))
        return tuple(replace(work, forwards=part * work.forwards) for method, part in parts for work in method.cost())
