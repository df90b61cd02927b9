"""Make the student's clips indistinguishable from real ones: a discriminator, and what the teacher or the real clip says besides.

Sauer et al., Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation (LADD), 2403.12015.

    repeat discriminator_updates times:
    1    x = student's clip                                                     (no gradient)
    2    discriminator: real clips against x
    3  x = student's clip                                                       (gradient through the last call)
    4  lambda_G * (the generator's loss)
    5  + distillation * a_t |x - guided teacher(x_t)|^2                         (ADD, 2311.17042)
    6  + regression * d(x, x0), if x was predicted from noised x0               (SF-V, 2406.04324)

The discriminator is an `Adversary`; that of Seaweed-APT (2501.08316) is trained whole and sees clean clips. AAPT (2506.09350)
judges long streams in parts that overlap: a rollout that goes on, whose clips it sees with the frames before them.

Not from the papers: features are the teacher's also where ADD has DINOv2's of pixels; penalties are approximate (2501.08316) also
where ADD, GDD and SF-V have the exact gradient; SF-V's heads for single frames and single places are of one kind; in AAPT's D a
frame has seen later ones; all turns of an iteration use the same prompts with different noise; the hinge of SF-V, which is
printed with the wrong sign, has the usual one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount, Count, Natural, Positive, require_bounds
from fewstep.diffusion import CFG, LogitNormal, TimeDensity, Uniform
from fewstep.methods import targets
from fewstep.methods.adversary import Adversary
from fewstep.methods.base import Method, Nets, Sync, Update, judged
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import FromData, Rollout, SelfForced
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class AdversarialDistillation(Method):
    """Latent adversarial distillation (LADD); with its terms ADD, SF-V, GDD, Seaweed-APT, AAPT and the mobile student."""

    cite: ClassVar[str] = "Sauer et al., Latent Adversarial Diffusion Distillation, 2403.12015"
    continues: ClassVar[bool] = True

    rollout: Rollout = FromData()
    """How the student's clips are made: from noised clips (LADD, ADD, SF-V), or with its own sampler (`BackwardSimulation`)."""
    adversary: Adversary = Adversary(weight=1.0, loss="hinge", density=LogitNormal(mean=1.0))
    """The discriminator. LADD's times have a logit of mean 1: high times judge structure, low ones texture."""
    discriminator_updates: Count = 1
    """Updates of the discriminator per update of the student, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only the discriminator."""
    distillation: Amount = 0.0
    """lambda of line 5 (ADD: 2.5 beside an adversarial weight of 1); 0: the teacher has no opinion."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher in line 5."""
    distillation_density: TimeDensity = Uniform(low=0.02, high=0.98)
    """Times at which the teacher is asked."""
    regression: Amount = 0.0
    """Weight of line 6 (SF-V: 0.1); 0: off."""
    huber: Positive = 1e-3
    """c of line 6's pseudo-Huber distance."""

    def __post_init__(self) -> None:
        require_bounds(self)
        self.adversary.check_alone()
        self.adversary.check(self.rollout)
        if isinstance(self.rollout, SelfForced) and self.rollout.context and self.distillation == 0:
            raise ValueError(
                "context is for the teacher's opinion, and a discriminator does not read it; write context: false, or give "
                "distillation a weight"
            )
        if self.regression > 0 and not isinstance(self.rollout, FromData):
            raise ValueError(
                f"regression compares a clip with the one it was predicted from, and {type(self.rollout).__name__} does "
                "not begin with a noised clip of the data; set regression to 0, or the rollout to FromData"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts", "x0"} | self.rollout.needs)

    @property
    def critic(self) -> None:
        """None: a discriminator does not learn the student's distribution."""
        return None

    def aux(self) -> dict[str, Role]:
        return self.adversary.roles

    def updates(self, step: int) -> Iterator[Update | Sync]:
        trained, count = tuple(self.adversary.roles), self.discriminator_updates
        turns = [Update(trained, partial(self.discriminator_loss, k)) for k in range(count)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup)

    def discriminator_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"discriminator/{turn}")  # new samples in every turn
        x, _, shown, _ = judged(self.rollout(nets.student, batch, rng, grad=False), batch, nets)  # 1
        yield self.adversary.discriminator_losses(nets, *self.adversary.pair(nets, batch, x, shown.cond, rng), rng)  # 2

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        x, keep, shown, judges = judged(self.rollout(nets.student, batch, rng, grad=True), batch, nets)  # 3
        pair = self.adversary.pair(nets, batch, x, shown.cond, rng)
        losses = {"adversarial": self.adversary.student_loss(nets, *pair)}  # 4
        if self.distillation > 0:
            t = self.distillation_density.sample(len(x), rng)
            with torch.no_grad():
                x_t = nets.teacher.path.add_noise(x, rng.randn(x.shape, "eps"), t)
                real = self.guidance(judges.teacher, x_t, t, shown.cond, shown.uncond).x0
            a = nets.teacher.path.coeffs(t).a
            losses["distillation"] = self.distillation * targets.mse(
                x, real, a if keep is None else a[:, None] * keep
            )  # 5
        if self.regression > 0:
            losses["regression"] = self.regression * targets.pseudo_huber(x, batch.require("x0"), self.huber)  # 6
        yield losses

    def cost(self) -> tuple[Work, ...]:
        turns = self.discriminator_updates
        student = Work("student", turns * self.rollout.calls + self.rollout.work)
        asked = (Work("teacher", self.guidance.passes),) if self.distillation > 0 else ()
        return student, *asked, self.adversary.work(turns)
