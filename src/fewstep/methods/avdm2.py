"""Match clips to real ones with a discriminator, and single frames to an image teacher through its scores.

Zhu et al., Accelerating Video Diffusion Models via Distribution Matching, 2412.05899, algorithm 1.

    repeat critic_updates times:
    1    x = student's sampler up to a random exit                              (no gradient)
    2    image critic: minimise |critic(X_s, s, c) - target(X, eps)|^2          X = K random frames of x
    3    discriminator: minimise softplus(-D(real_t, t, c)) + softplus(D(x_t', t', c))
    4  x = student's sampler up to a random exit                                (gradient through the last call)
    5  g = (critic(X_s) - guided image teacher(X_s)) / mean|X - guided image teacher(X_s)|;  put lambda_SDM g on X
    6  + lambda_ADM softplus(-D(x_t, t, c))

X_s is noised on the image teacher's path, all else on the video teacher's. D is a head on frozen blocks of the video teacher.

Not from the paper, which does not give them: K, both lambdas, the normaliser of line 5 (DMD's, per frame), guidance, grid,
head, the times of line 2. Corrected: the sign of the paper's eq. 7, and its line 15, which must update the critic's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from fewstep.core import Batch, Cond, Losses, Rng
from fewstep.core.bounds import Count, Natural, Positive, require_bounds
from fewstep.diffusion import CFG, TimeDensity, Uniform
from fewstep.methods import targets
from fewstep.methods.adversary import Adversary
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.frames import fold_frames
from fewstep.methods.matching import ReverseKL, Scores
from fewstep.methods.roles import Copy, Other, Role
from fewstep.methods.rollouts import BackwardSimulation, Rollout
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work
from fewstep.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class AVDM2(Method):
    """Adversarial distribution matching of clips with score matching of their frames."""

    cite: ClassVar[str] = "Zhu et al., Accelerating Video Diffusion Models via Distribution Matching, 2412.05899"
    image_teacher: ModelSource | None = None
    """phi_2D: image model with the video teacher's latents and text states. null: the video teacher, frame by frame."""
    rollout: Rollout = BackwardSimulation()
    """How student samples are generated in training: with the student's own sampler."""
    score: Literal["frames", "video", "none"] = "frames"
    """Scores to match: of single frames; in the paper's two ablations, of whole clips with the video teacher, or none."""
    frames: Count = 4
    """K: random frames per clip, all different; a shorter clip gives all of its frames."""
    guidance: CFG = CFG(scale=7.5)
    """Guidance of the teacher whose score is matched; the critic uses none."""
    matching: ReverseKL = ReverseKL()
    """How the difference of teacher and critic becomes line 5."""
    score_weight: Positive = 1.0
    """lambda_SDM: weight of the score loss."""
    adversary: Adversary | None = Adversary(
        weight=0.01, density=Uniform(low=0.0, high=0.5), layers=(0, 1), head="joint"
    )
    """The discriminator and lambda_ADM, its weight. Its times must be high enough that real and generated clips overlap, and low
    enough that they differ. null: none, and no clips are needed."""
    critic_updates: Count = 2
    """Updates of critic and discriminator per student update, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only critic and discriminator."""
    score_density: TimeDensity = Uniform(low=0.2, high=0.98)
    """s: density of times for scores and critic, on the path of the teacher whose score is matched."""

    def __post_init__(self) -> None:
        require_bounds(self)
        self.matching.check(self.guidance, stills=self.score == "frames")
        if self.score == "none" and self.adversary is None:
            raise ValueError("no scores (score: none) and adversary null: no loss is left; set one")
        if self.adversary:
            self.adversary.check_alone()
        if self.score != "frames" and self.image_teacher is not None:
            raise ValueError(f"score {self.score} does not use an image teacher; write image_teacher: null")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"} | self.rollout.needs | ({"x0"} if self.adversary else set()))

    @property
    def real(self) -> str:  # the role whose score is matched
        return "teacher" if self.image_teacher is None else "image_teacher"

    @property
    def fake(self) -> str:  # the role that learns the student's score
        return "image_critic" if self.score == "frames" else "critic"

    def aux(self) -> dict[str, Role]:
        image = {} if self.image_teacher is None else {"image_teacher": Other(self.image_teacher, stills=True)}
        critic = {} if self.score == "none" else {self.fake: Copy(self.real)}
        return {**image, **critic} | (self.adversary.roles if self.adversary else {})

    def updates(self, step: int) -> Iterator[Update | Sync]:
        trained = tuple(role for role, made in self.aux().items() if made.trainable)
        turns = [Update(trained, partial(self.critic_loss, k)) for k in range(self.critic_updates)]
        return in_turns(step, turns, Update(("student",), self.student_loss), warmup=self.warmup)

    def critic_loss(self, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"critic/{turn}")  # new samples in every turn
        x, losses = self.rollout(nets.student, batch, rng, grad=False).x0, {}  # 1
        if self.score != "none":
            seen, cond, _ = self.seen(x, batch, rng)
            s, eps = self.noise(seen, rng)
            x_s = nets[self.fake].path.add_noise(seen, eps, s)
            losses["denoising"] = targets.denoising(nets[self.fake](x_s, s, cond), seen, eps)  # 2
        if self.adversary:
            shown = self.adversary.pair(nets, batch, x, batch.cond, rng)
            losses |= self.adversary.discriminator_losses(nets, *shown, rng)  # 3
        yield losses

    def student_loss(self, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        rolled = self.rollout(nets.student, batch, rng, grad=True)  # 4
        x, losses = rolled.x0, {}
        if self.score != "none":
            seen, cond, uncond = self.seen(x, batch, rng)
            below = rolled.t.repeat_interleave(len(seen) // len(x), 0)
            noised = self.matching.noised(seen, nets[self.fake].path, *self.noise(seen, rng), below, rng)
            scores = Scores(nets[self.real], nets[self.fake], self.guidance, cond, uncond)
            losses["matching"] = self.score_weight * self.matching.loss(noised, scores)  # 5
        if self.adversary:
            shown = self.adversary.pair(nets, batch, x, batch.cond, rng)
            losses["adversarial"] = self.adversary.student_loss(nets, *shown)  # 6
        yield losses

    def seen(self, x: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, Cond, Cond]:
        """Input of the score networks from clips `[B, C, F, H, W]`: K frames of each, `[B K, C, 1, H, W]`, or whole clips."""
        if self.score == "video":
            return x, batch.cond, batch.uncond
        stills = fold_frames(x, self.frames, rng)
        return stills.clips, stills.of(batch.cond), stills.of(batch.uncond)

    def noise(self, seen: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Times s and noise for the score networks, on whose path it is added."""
        return self.score_density.sample(len(seen), rng), rng.randn(seen.shape, "eps")

    def cost(self) -> tuple[Work, ...]:
        turns, frames = self.critic_updates, self.frames if self.score == "frames" else 0
        real = Work(self.real, self.matching.teacher_calls(self.guidance), frames)
        scores = (real, Work(self.fake, 3 * turns + 1, frames)) if self.score != "none" else ()
        eyes = (self.adversary.work(turns),) if self.adversary else ()
        return Work("student", turns * self.rollout.calls + self.rollout.work), *scores, *eyes
