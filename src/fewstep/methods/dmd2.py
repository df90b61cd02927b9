"""Match the student's distribution to the teacher's: follow the difference of their scores.

Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, 2405.14867; regression term: DMD, 2311.18828.

    repeat critic_updates times:
    1    x = student's sampler up to a random exit                              (no gradient)
    2    critic: minimise |critic(x_t, t, c) - target(x, eps)|^2,  x_t = a x + s eps
    3    discriminator: minimise softplus(-D(real_t)) + softplus(D(x_t))        (with an adversary)
    4  x = student's sampler up to a random exit                                (gradient through the last call)
    5  g = (critic(x_t) - guided teacher(x_t)) / mean|x - guided teacher(x_t)|;  put g on x
    6  + lambda_G softplus(-D(x_t)) - lambda_r reward(decoded x)                 (with an adversary; with feedback)
    7  + anchor * d(student(stored state), stored endpoint)
    8  critic <- (1 - align) critic + align student                              (if align > 0)

Not from the paper: turns share prompts, not noise; D's features are frozen; critic warm-up; lines 7 (with pseudo-Huber) and 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount, Count, Natural, Part, require_bounds
from fewstep.diffusion import CFG, TimeDensity, Uniform
from fewstep.methods import targets
from fewstep.methods.adversary import Adversary
from fewstep.methods.base import Method, Nets, Sync, Update, judged
from fewstep.methods.matching import Matching, ReverseKL, Scores
from fewstep.methods.rewards import Feedback, Reweighting
from fewstep.methods.roles import Role
from fewstep.methods.rollouts import BackwardSimulation, FromPairs, Rollout
from fewstep.methods.scorers import Scorers
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class DMD2(Method):
    """Distribution matching distillation (DMD, DMD2); with other matchings Diff-Instruct, VSD, f-distill, SiD and SIM."""

    cite: ClassVar[str] = "Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, 2405.14867"
    continues: ClassVar[bool] = True
    rollout: Rollout = BackwardSimulation()
    """How student samples are generated in training: with the student's own sampler."""
    matching: Matching = ReverseKL()
    """How the difference of teacher and critic becomes a loss; DMD2's own is the reverse KL."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher; it is distilled into the student. The critic uses none."""
    scorers: Scorers = Scorers()
    """Teacher and critic, if they are other models than the student's, such as larger ones; or a weakened teacher."""
    critic_updates: Count = 5
    """Critic updates per student update, all in one iteration."""
    critic_guidance: CFG = CFG()
    """Guidance of the critic: none in DMD2, the teacher's in SiD-LSG (2406.01561), 0 in Zero-CFG (2505.12674; both are run)."""
    warmup: Natural = 0
    """First iterations, which train only the critic (and the discriminator)."""
    score_density: TimeDensity = Uniform(low=0.02, high=0.98)
    """Density of t for the score difference."""
    critic_density: TimeDensity = Uniform()
    """Density of t for the critic's training."""
    adversary: Adversary | None = None
    """GAN loss beside the matching, which needs clips (lambda_G: 0.001 to 0.03); null: none."""
    reweighting: Reweighting | None = None
    """Clips that its reward prefers count more in line 5 (Re-DMD, 2512.04678); null: all alike."""
    feedback: Feedback | None = None
    """The gradient of a reward beside the matching (T2V-Turbo, 2405.18750); null: none."""
    align: Part = 0.0
    """Share of the student's weights that the critic takes after each update of the student (SenseFlow: 0.03); 0: none."""
    anchor: Amount = 0.0
    """lambda_reg: weight of the regression on stored pairs (DMD: 0.25); 0: off, and no pairs are needed."""
    anchor_rollout: FromPairs = FromPairs()
    """Stored states that the regression reads."""

    def __post_init__(self) -> None:
        require_bounds(self)
        self.matching.check(self.guidance)
        m, d, at = self.matching, self.adversary, (None, self.score_density, self.critic_density)
        if m.judged and (d is None or d.loss != "softplus" or d.clean or d.mismatched or d.density not in at):
            raise ValueError(f"{m} needs an adversary with loss: softplus, density: null, neither clean nor mismatched")
        for held in [*self.held, self.anchor_rollout] if self.anchor > 0 else self.held:
            held.check(self.rollout)

    @property
    def held(self) -> list[Adversary | Reweighting | Feedback]:
        return [held for held in (self.adversary, self.reweighting, self.feedback) if held is not None]

    @property
    def needs(self) -> frozenset[str]:
        own = {"prompts", "pairs"} if self.anchor > 0 else {"prompts"}
        return frozenset(own | self.rollout.needs).union(*(held.needs for held in self.held))

    def aux(self) -> dict[str, Role]:
        return self.scorers.roles | {name: role for held in self.held for name, role in held.roles.items()}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        trained = tuple(role for role, made in self.aux().items() if made.trainable)
        turns = [Update(trained, partial(self.critic_loss, k)) for k in range(self.critic_updates)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup, align=self.align)  # 8

    def critic_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"critic/{turn}")  # new samples in every turn
        x0, keep, shown, judges = judged(self.rollout(nets.student, batch, rng, grad=False), batch, nets)  # 1
        eps, t = rng.randn(x0.shape, "eps"), self.critic_density.sample(len(x0), rng)
        x_t = nets.critic.path.add_noise(x0, eps, t)
        prediction = self.critic_guidance(judges.critic, x_t, t, shown.cond, shown.uncond)
        yield {"denoising": targets.denoising(prediction, x0, eps, keep)}  # 2
        if self.adversary:
            real, fake = self.adversary.pair(nets, batch, x0, shown.cond, rng, (eps, t))
            yield self.adversary.discriminator_losses(nets, real, fake, rng)  # 3

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        rolled = self.rollout(nets.student, batch, rng, grad=True)  # 4
        x0, keep, shown, judges = judged(rolled, batch, nets)
        t, eps = self.score_density.sample(len(x0), rng), rng.randn(x0.shape, "eps")
        early, late = self.adversary.divided(x0, rolled.t) if self.adversary else (x0, x0)
        noised = self.matching.noised(early, nets.teacher.path, t, eps, rolled.t, rng)
        keep = keep if self.reweighting is None else self.reweighting.keep(rolled, shown, nets)
        losses = {"matching": self.matching.loss(noised, self.scores(nets, judges, shown), keep)}  # 5
        if self.adversary:
            real, fake = self.adversary.pair(nets, batch, late, shown.cond, rng, (eps, t))
            losses["adversarial"] = self.adversary.student_loss(nets, real, fake)  # 6
        if self.feedback:
            losses["reward"] = self.feedback.loss(rolled.x0, shown, nets, rng)  # 6
        yield losses
        if self.anchor > 0:
            stored = self.anchor_rollout(nets.student, batch, rng, grad=True)
            yield {"anchor": self.anchor * targets.pseudo_huber(stored.x0, batch.require("pairs").states[:, -1])}  # 7

    def scores(self, nets: Nets, judges: Nets, shown: Batch) -> Scores:
        """Teacher (real) and critic (fake), as they judge the clips of a batch, and the discriminator."""
        logits = partial(self.adversary.logits, nets, cond=shown.cond) if self.adversary else None
        real = judges[self.scorers.role]
        return Scores(real, judges.critic, self.guidance, shown.cond, shown.uncond, self.critic_guidance, logits)

    def cost(self) -> tuple[Work, ...]:
        turns, back, critic = self.critic_updates, self.matching.backward, self.critic_guidance.passes
        return (
            Work(
                "student", turns * self.rollout.calls + self.rollout.work + (self.anchor > 0) * self.anchor_rollout.work
            ),
            Work(self.scorers.role, self.matching.teacher_calls(self.guidance)),
            Work("critic", (3 * turns + 1 + back) * critic),
            *((self.adversary.work(turns, asked=self.matching.judged),) if self.adversary else ()),
        )
