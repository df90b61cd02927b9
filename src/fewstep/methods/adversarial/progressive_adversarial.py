"""Progressive distillation whose last stages have a discriminator in place of the regression, so that few steps stay sharp.

Lin et al., SDXL-Lightning: Progressive Adversarial Diffusion Distillation, 2402.13929; AnimateDiff-Lightning, 2403.12706.

    for N in stages:                                    (lines 1 to 6 of Progressive, while N is larger than `steps`)
    1    x_u, u, x_s, s = the way of the stage's model from a noised clip to the next time of the student's grid
    2    discriminator: D(x_s, s, c | x_u, u) against D(x, s, c | x_u, u),   x = the student's step from x_u to s   (no gradient)
    3  the same with new noise;  lambda_G * (the generator's loss of D(x, s, c | x_u, u))           (gradient through x)

D sees where the step began. So a student must go where its teacher goes from the same noise, and keeps its modes; a regression
that few steps cannot fit makes it blur. In the last share `alone` of a stage D does not see it any more, which sharpens (the
papers' unconditional objective).

D reads features of the end and of the beginning side by side, of one encoder that starts as the teacher (`Adversary.trained`).
Not from the papers: D is carried on through stages and objectives, and sees the end twice where it does not see the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Count, Natural, Part, require_bounds
from fewstep.diffusion import CFG, Contract
from fewstep.methods.adversary import Adversary, Shown
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.histories import WholeClip
from fewstep.methods.progressive import Progressive
from fewstep.methods.roles import Heads, Role
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class ProgressiveAdversarial(Method):
    """Progressive adversarial distillation (SDXL-Lightning, AnimateDiff-Lightning)."""

    cite: ClassVar[str] = "Lin et al., SDXL-Lightning: Progressive Adversarial Diffusion Distillation, 2402.13929"

    progressive: Progressive = Progressive(stages=((16, 200), (8, 400), (4, 400), (2, 400)))
    """Stages, guidance and grid (SDXL-Lightning: from 128 steps to 32, 8, 4, 2 and 1)."""
    steps: Count = 8
    """Stages of at most so many steps have the discriminator."""
    alone: Part = 0.0
    """Share of each of these stages, at its end, in which D does not see where the step began."""
    adversary: Adversary = Adversary(weight=1.0, trained=True)
    """D: its losses, layers and stabilisers. Steps are shown as they end, at their own times."""
    warmup: Natural = 0
    """First iterations of each of these stages, which train only D: in a new stage it sees other steps."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.adversary.clean or self.adversary.density is not None:
            raise ValueError("steps end at times of their own: leave adversary.clean and adversary.density as they are")
        self.adversary.check_whole()
        if self.alone > 0 and self.adversary.r1 + self.adversary.r2 > 0:
            raise ValueError(
                "r1 and r2 move the end of a step, which alone shows twice; write alone: 0, or r1: 0 and r2: 0"
            )
        if not isinstance(self.progressive.history, WholeClip):
            raise ValueError("the discriminator judges whole clips; leave progressive.history as it is")
        if self.progressive.stages[-1][0] > self.steps:
            raise ValueError(
                f"the last stage has {self.progressive.stages[-1][0]} steps, and only stages of at most {self.steps} have the "
                "discriminator; raise steps, add stages, or take Progressive"
            )
        if self.warmup >= (shortest := min(length for n, length in self.progressive.stages if n <= self.steps)):
            raise ValueError(f"warmup {self.warmup} leaves no update of the student in a stage of {shortest}; lower it")

    @property
    def needs(self) -> frozenset[str]:
        return self.progressive.needs

    @property
    def guidance(self) -> CFG:
        return self.progressive.guidance

    def aux(self) -> dict[str, Role]:
        heads = Heads(self.adversary.eyes, self.adversary.layers, self.adversary.head, views=2)
        return {**self.progressive.aux(), **self.adversary.roles, "discriminator": heads}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        index, start = self.progressive.stage(step)
        steps, length = self.progressive.stages[index]
        for event in self.progressive.updates(step):
            if isinstance(event, Sync) or steps > self.steps:
                yield event
                continue
            guidance = self.progressive.guidance_in(index)
            alone = step - start >= (1 - self.alone) * length
            judge = Update(tuple(self.adversary.roles), partial(self.discriminator_loss, steps, guidance, alone))
            student = Update(("student",), partial(self.student_loss, steps, guidance, alone))
            yield from in_turns(step - start, [judge], student, warmup=self.warmup)

    def discriminator_loss(
        self, steps: int, guidance: CFG, alone: bool, nets: Nets, batch: Batch, rng: Rng
    ) -> Iterator[Losses]:
        rng = rng.fold("discriminator")
        with torch.no_grad():
            real, fake = self.ends(steps, guidance, alone, nets, batch, rng)
        yield self.adversary.discriminator_losses(nets, real, fake, rng)  # 2

    def student_loss(
        self, steps: int, guidance: CFG, alone: bool, nets: Nets, batch: Batch, rng: Rng
    ) -> Iterator[Losses]:
        real, fake = self.ends(steps, guidance, alone, nets, batch, rng.fold("student"))
        yield {"adversarial": self.adversary.student_loss(nets, real, fake)}  # 3

    def ends(self, steps: int, guidance: CFG, alone: bool, nets: Nets, batch: Batch, rng: Rng) -> tuple[Shown, Shown]:
        """Where the stage's model and the student lead, as D sees them."""
        x_u, u, x_s, s, _ = self.progressive.walk(steps, guidance, nets, batch, rng)  # 1
        x = nets.student(x_u, u, batch.cond).step_to(s)
        real, fake = (Shown(end, s, batch.cond, before=(end, s) if alone else (x_u, u)) for end in (x_s, x))
        return real, fake

    def check(self, steps: int) -> None:
        self.progressive.check(steps)
        last = steps - sum(length for _, length in self.progressive.stages[:-1])
        if self.progressive.stages[-1][0] <= self.steps and last <= self.warmup:
            raise ValueError(
                f"settings.steps leaves {last} iterations to the last stage, and its warmup has {self.warmup}, so it would not "
                f"train the student; write settings.steps of at least {steps - last + self.warmup + 1}, or a shorter warmup"
            )

    def lengthened(self, factor: float) -> Self:
        return replace(self, progressive=self.progressive.lengthened(factor))

    def contract(self, teacher: Contract) -> Contract:
        return self.progressive.contract(teacher)

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        return self.progressive.contract_at(teacher, step)

    def cost(self) -> tuple[Work, ...]:
        stages = self.progressive.stages
        judged = sum(length for n, length in stages if n <= self.steps) / sum(length for _, length in stages)
        student, stage = self.progressive.cost()
        eyes = self.adversary.work(1)
        return (
            replace(student, forwards=student.forwards + judged),  # a second walk, for the discriminator
            replace(stage, forwards=(1 + judged) * stage.forwards),
            replace(
                eyes, forwards=judged * (2 * eyes.forwards - 1)
            ),  # two views; the student's has no gradient in the beginning
        )
