"""Match the student's distribution to the teacher's: follow the difference of their scores.

Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, 2405.14867; regression term: Yin et
al., One-step Diffusion with Distribution Matching Distillation, 2311.18828.

    repeat critic_updates times:
    1    x = student's sampler up to a random exit                              (no gradient)
    2    critic: minimise |critic(x_t, t, c) - target(x, eps)|^2,  x_t = a x + s eps
    3    discriminator: minimise softplus(-D(real_t)) + softplus(D(x_t))        (if gan > 0)
    4  x = student's sampler up to a random exit                                (gradient through the last call)
    5  g = (critic(x_t) - guided teacher(x_t)) / mean|x - guided teacher(x_t)|;  put g on x
    6  + gan * softplus(-D(x_t))
    7  + motion * (line 5 on differences of neighbouring frames)
    8  + anchor * d(student(stored state), stored endpoint)

Not from the paper: all turns of an iteration (critic and student) use the same prompts with different noise; D is heads of its
own on frozen teacher features, not on the critic's bottleneck; R1 (2501.08316); critic warm-up; line 7 (2603.09488). Line 8 is
DMD's, with pseudo-Huber on latents instead of LPIPS: it keeps modes that reverse KL loses. `weak` (2503.13319): the real score
is that of teacher weights moved towards the critic's. `reward` (Re-DMD, 2512.04678): g times exp(r / beta), of mean 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Losses, Rng
from fewstep.core.bounds import Amount, Count, Natural, Part, require_bounds
from fewstep.diffusion import CFG, TimeDensity, Uniform
from fewstep.methods import targets
from fewstep.methods.base import Method, Nets, Update, judged
from fewstep.methods.motion import motion_matching
from fewstep.methods.rewards import Reward
from fewstep.methods.roles import Copy, Decoder, Heads, Role, Weak
from fewstep.methods.rollouts import BackwardSimulation, FromPairs, Rollout
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class DMD2(Method):
    """Distribution matching distillation."""

    cite: ClassVar[str] = "Yin et al., Improved Distribution Matching Distillation for Fast Image Synthesis, 2405.14867"
    continues: ClassVar[bool] = True
    rollout: Rollout = BackwardSimulation()
    """How student samples are generated in training: with the student's own sampler."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher; it is distilled into the student. The critic uses none."""
    critic_updates: Count = 5
    """Critic updates per student update, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only the critic (and the discriminator)."""
    score_density: TimeDensity = Uniform(low=0.02, high=0.98)
    """Density of t for the score difference."""
    critic_density: TimeDensity = Uniform()
    """Density of t for the critic's training."""
    gan: Amount = 0.0
    """lambda_G: weight of the GAN loss under mean reduction (published: 0.001 to 0.03); 0: off, and no clips are needed."""
    r1: Amount = 0.0
    """Weight of the approximate R1 penalty on the discriminator; 0: off."""
    rho: Amount = 0.1
    """Size of the perturbation of the noised latents in the R1 penalty."""
    layers: tuple[int, ...] = (-1,)
    """Teacher blocks whose features the discriminator reads."""
    motion: Amount = 0.0
    """Weight of matching the motion between frames (Diagonal Distillation: 0.2); 0: off."""
    reward: Reward | None = None
    """Clips that it prefers count more in line 5; null: all alike."""
    weak: Part = 0.0
    """Share of the critic's adapters added to the teacher for the real score (MagicDistillation: 0.25); 0: none. Needs LoRA."""
    anchor: Amount = 0.0
    """lambda_reg: weight of the regression on stored pairs (DMD: 0.25); 0: off, and no pairs are needed."""
    anchor_rollout: FromPairs = FromPairs()
    """Stored states that the regression reads."""

    def __post_init__(self) -> None:
        require_bounds(self)

    @property
    def needs(self) -> frozenset[str]:
        gan, anchor = {"x0"} if self.gan > 0 else set(), {"pairs"} if self.anchor > 0 else set()
        return frozenset({"prompts"} | self.rollout.needs | gan | anchor)

    def aux(self) -> dict[str, Role]:
        roles: dict[str, Role] = {"critic": Copy("teacher")}
        roles |= {"real": Weak("critic", self.weak)} if self.weak > 0 else {}
        roles |= {"codec": Decoder()} if self.reward is not None else {}
        return roles | ({"discriminator": Heads("teacher", self.layers)} if self.gan > 0 else {})

    def updates(self, step: int) -> Iterator[Update]:
        trained = tuple(role for role, made in self.aux().items() if made.trainable)
        for k in range(self.critic_updates):
            yield Update(trained, partial(self.critic_loss, k))
        if step >= self.warmup:
            yield Update(("student",), self.student_loss)

    def critic_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"critic/{turn}")  # new samples in every turn
        x0, keep, shown, judges = judged(self.rollout(nets.student, batch, rng, grad=False), batch, nets)  # 1
        eps, t = rng.randn(x0.shape, "eps"), self.critic_density.sample(len(x0), rng)
        x_t = nets.critic.path.add_noise(x0, eps, t)
        yield {"denoising": targets.denoising(judges.critic(x_t, t, shown.cond), x0, eps, keep)}  # 2
        if self.gan > 0:
            real_t = nets.teacher.path.add_noise(batch.require("x0"), eps, t)
            moved = [(real_t + self.rho * rng.randn(x0.shape, "r1"), batch.cond)] if self.r1 > 0 else []
            with torch.no_grad():  # the features are frozen; only the heads learn
                views = [(real_t, batch.cond), (x_t, shown.cond), *moved]
                taps = [nets.teacher.features(x, t, c, self.layers) for x, c in views]
            real, fake, *near = (nets.discriminator(tap) for tap in taps)
            losses = {"discriminator": targets.adversarial_discriminator(real, fake)}  # 3
            yield losses | ({"r1": self.r1 * targets.approximate_r1(real, near[0])} if near else {})

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        rolled = self.rollout(nets.student, batch, rng, grad=True)  # 4
        x0, keep, shown, judges = judged(rolled, batch, nets)
        t = self.score_density.sample(len(x0), rng)
        x_t = nets.teacher.path.add_noise(x0, rng.randn(x0.shape, "eps"), t)
        real, fake = self.scores(judges, shown, x_t, t)
        keep = keep if self.reward is None else self.reward.keep(nets.codec, rolled)
        losses = {"matching": targets.distribution_matching(x0, real, fake, keep=keep)}  # 5
        if self.gan > 0:
            logits = nets.discriminator(nets.teacher.features(x_t, t, shown.cond, self.layers))
            losses["adversarial"] = self.gan * targets.adversarial_generator(logits)  # 6
        if self.motion > 0:
            losses["motion"] = self.motion * motion_matching(x0, real, fake)  # 7
        yield losses
        if self.anchor > 0:
            stored = self.anchor_rollout(nets.student, batch, rng, grad=True)
            yield {"anchor": self.anchor * targets.pseudo_huber(stored.x0, batch.require("pairs").states[:, -1])}  # 8

    @torch.no_grad()
    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The x0 predictions of the guided teacher (real) and of the critic (fake)."""
        real = nets["real"] if self.weak > 0 else nets.teacher
        return self.guidance(real, x_t, t, batch.cond, batch.uncond).x0, nets.critic(x_t, t, batch.cond).x0

    def cost(self) -> tuple[Work, ...]:
        turns, guided, r1 = self.critic_updates, self.guidance.passes, 1 if self.r1 > 0 else 0
        return (
            Work("student", turns * self.rollout.calls + self.rollout.work + (3 if self.anchor > 0 else 0)),
            Work("real" if self.weak > 0 else "teacher", guided),
            Work("critic", 3 * turns + 1),
            *((Work("teacher", (2 + r1) * turns + 2, layers=self.layers),) if self.gan > 0 else ()),
        )
