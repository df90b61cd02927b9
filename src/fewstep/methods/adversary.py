"""The adversarial part of a method: a discriminator on features of the teacher, its losses and its stabilisers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core import Batch, Cond, Losses, Rng
from fewstep.core.bounds import Amount, Count, Fraction, Positive, require_bounds
from fewstep.diffusion import TimeDensity
from fewstep.diffusion.path import broadcast
from fewstep.methods import gan
from fewstep.methods.base import Nets
from fewstep.methods.roles import Copy, Head, Heads, Role
from fewstep.methods.rollouts import Rollout
from fewstep.methods.work import Work


@dataclass(frozen=True)
class Shown:
    """A clip as the discriminator sees it: with noise, and with its prompt."""

    x_t: Tensor
    t: Tensor
    cond: Cond
    before: tuple[Tensor, Tensor] | None = None
    """Clip and time that are shown beside it: where the step began that ended here."""


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """A discriminator D of real and generated clips: trained heads on features of the teacher (LADD, 2403.12015; DMD2).

    Its gradient reaches the student through the features. All losses are means over logits, so weights do not depend on sizes.
    """

    weight: Positive = 0.03
    """lambda_G: weight of the student's term (published with mean reduction: 0.001 to 0.03). D's own loss has weight 1."""
    loss: gan.Gan = "softplus"
    """softplus: the non-saturating GAN loss. hinge: LADD, SF-V. relativistic: logits of pairs are compared (AAPT, 2506.09350)."""
    density: TimeDensity | None = None
    """Times of the clips that D compares, drawn for real and generated clips apart. null: those of the critic and of the scores,
    with the same noise for both (FastGen)."""
    layers: tuple[int, ...] = (-1,)
    """Teacher blocks whose features D reads."""
    trained: bool = False
    """Train a copy of the teacher beneath the heads, too (Seaweed-APT, 2501.08316): stronger, and as large as the student. false:
    the features are frozen."""
    clean: bool = False
    """Show clips without noise. The features are told a time all the same, which should vary (APT: t = 0 alone collapses)."""
    draws: Count = 1
    """Times and noises, drawn from `density`, at which each clip is shown in one update: less noise in the gradient, for as many
    calls of the features."""
    mismatched: bool = False
    """D learns that a real clip under another one's prompt is not real either (matching-aware: 1605.05396, 2303.05511), so that
    it looks at what the prompt says, and not at faults of the picture alone. Half of the weight of what is not real."""
    head: Head = "separate"
    """separate: a small convolutional head per layer, with a logit per clip. joint: one on all layers, with a logit per patch
    (AVDM2). block: one transformer block on all layers, with a logit per patch that has seen the whole clip (2507.13343). query:
    one learned query per layer, with a logit per clip (Seaweed-APT). frames: the same, with a logit per frame of the features
    (AAPT), also of frames that other losses leave out, such as an overlap."""
    r1: Amount = 0.0
    """Weight of the approximate R1 penalty (2501.08316), on real clips; `r2` on generated ones. 0: off."""
    r2: Amount = 0.0
    split: Fraction = 0.0
    """Time, after the shift, that divides the student's calls in `DMD2`: above it only the scores move their clips, up to it only
    D (Flash-DMD, 2511.20549). 0: both, everywhere. In the paper D sees pixels of clips that were made to the end, noised and
    predicted."""
    rho: Positive = 0.1
    """Size of the perturbation of noised latents in r1 and r2. lambda rho^2 is what counts."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not self.layers:
            raise ValueError("layers names no block of the teacher; give at least one, such as (-1,), the last")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers names a block twice, whose heads would do the same work; write each once, got {list(self.layers)}"
            )
        if self.draws > 1 and self.density is None:
            raise ValueError(
                "draws are drawn from adversary.density, which is null; give it a density, or write draws: 1"
            )

    def check(self, rollout: Rollout) -> None:
        """Refuse (ValueError) pairs of different prompts; a split that leaves scores or D without calls, and one of clips that go
        on, which have no time at which they were predicted."""
        if self.paired and rollout.carries:
            raise ValueError(
                f"adversary.loss: relativistic compares pairs of one prompt, and {type(rollout).__name__} goes on with prompts "
                "of earlier batches; write loss: softplus, or take SelfForced with clips and overlap"
            )
        if self.split == 0:
            return
        if not rollout.whole:
            raise ValueError(
                f"adversary.split divides whole clips by the time of their last call, and {type(rollout).__name__} goes on with "
                "clips; write split: 0"
            )
        times = sorted(rollout.ends, reverse=True)
        if not times[-1] <= self.split < times[0]:
            listed = ", ".join(f"{t:.3g}" for t in times)
            raise ValueError(
                f"adversary.split is {self.split}, and the last calls of the rollout are at the times {listed}, after the shift; "
                "choose a split with times above it, for the scores, and others up to it, for the discriminator; or write 0"
            )

    def check_alone(self) -> None:
        """Refuse (ValueError) an adversary that shares times or calls with scores, for a method that has no such scores."""
        if self.density is None:
            raise ValueError(
                "adversary.density is null, and there are no scores whose times it could share; give it a density"
            )
        self.check_whole()

    def check_whole(self) -> None:
        """Refuse (ValueError) a split, for a method whose calls D has to itself."""
        if self.split > 0:
            raise ValueError("adversary.split divides the calls of DMD2 between its scores and D; write split: 0")

    def divided(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The same clips twice: with gradient where the scores move them, and where D does. `t` (`[B]` or `[B, F]`) is the time
        at which the student predicted them."""
        if self.split == 0:
            return x0, x0
        above = broadcast(t > self.split, x0)
        return torch.where(above, x0, x0.detach()), torch.where(above, x0.detach(), x0)

    @property
    def eyes(self) -> str:
        """The role whose features D reads."""
        return "eyes" if self.trained else "teacher"

    @property
    def least_batch(self) -> int:
        """Fewest clips of a batch: with `mismatched` one has the prompt of another."""
        return 2 if self.mismatched else 1

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that it reads."""
        return frozenset({"x0"})

    @property
    def roles(self) -> dict[str, Role]:
        eyes: dict[str, Role] = {"eyes": Copy("teacher")} if self.trained else {}
        return eyes | {"discriminator": Heads(self.eyes, self.layers, self.head)}

    def pair(
        self, nets: Nets, batch: Batch, x: Tensor, cond: Cond, rng: Rng, given: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Shown, Shown]:
        """Real clips of the batch and the student's `x`, with noise: each with its own, or both with the `given` (eps, t)."""

        def noised(clip: Tensor, cond: Cond, rng: Rng) -> Shown:
            if self.density is not None:
                rows = torch.arange(len(clip), device=clip.device).repeat(self.draws)
                clip, cond = clip[rows], cond[rows]
                eps, t = rng.randn(clip.shape, "eps"), self.density.sample(len(clip), rng)
            else:
                assert given is not None, "a method without such times needs adversary.density"
                eps, t = given
            return Shown(clip if self.clean else nets.teacher.path.add_noise(clip, eps, t), t, cond)

        return noised(batch.require("x0"), batch.cond, rng.fold("real")), noised(x, cond, rng.fold("fake"))

    def discriminator_losses(self, nets: Nets, real: Shown, fake: Shown, rng: Rng) -> Losses:
        """D's losses, with no gradient in the clips."""
        there, made = self._judged(nets, real), self._judged(nets, fake)
        losses = {"discriminator": gan.discriminator(self.loss, *self._against_mismatched(nets, real, there, made))}
        if self.r1 > 0:
            losses["r1"] = self.r1 * gan.approximate_r1(there, self._judged(nets, self._moved(real, rng, "r1")))
        if self.r2 > 0:
            losses["r2"] = self.r2 * gan.approximate_r1(made, self._judged(nets, self._moved(fake, rng, "r2")))
        return losses

    def student_loss(self, nets: Nets, real: Shown, fake: Shown) -> Tensor:
        """lambda_G times the student's loss. The relativistic one alone reads real clips."""
        if not self.paired:
            return self.weight * gan.generator(self.loss, self._logits(nets, fake))
        with torch.no_grad():
            there = self._logits(nets, real)
        return self.weight * gan.generator(self.loss, self._logits(nets, fake), there)

    @property
    def paired(self) -> bool:
        """Whether the student's loss reads real clips."""
        return self.loss == "relativistic"

    def logits(self, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D of noised clips, `[B, heads]`."""
        return self._logits(nets, Shown(x_t, t, cond))

    def work(self, turns: int, *, asked: int = 0) -> Work:
        """Of the features in `turns` updates of D and one of the student, and where others have `asked` for `logits`."""
        seen = 2 + (self.r1 > 0) + (self.r2 > 0) + self.mismatched
        each = 3 if self.trained else 1
        return Work(self.eyes, self.draws * (each * seen * turns + 2 + self.paired) + asked, layers=self.layers)

    def _logits(self, nets: Nets, clip: Shown) -> Tensor:
        return nets.discriminator(self._seen(nets, clip))

    def _seen(self, nets: Nets, clip: Shown) -> list[Tensor]:
        """Features of the clip, and beside them, as further channels, those of what was before it."""
        views = [(clip.x_t, clip.t), *([clip.before] if clip.before is not None else [])]
        seen = [nets[self.eyes].features(x, t, clip.cond, self.layers) for x, t in views]
        return [torch.cat(each, 1) for each in zip(*seen, strict=True)]

    def _judged(self, nets: Nets, clip: Shown) -> Tensor:
        """Logits with gradient in the heads, and in the features if they are trained."""
        with torch.set_grad_enabled(self.trained):
            features = self._seen(nets, replace(clip, x_t=clip.x_t.detach()))
        return nets.discriminator(features)

    def _against_mismatched(self, nets: Nets, real: Shown, there: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of what is real, and of what is not: with `mismatched`, real clips under the next one's prompt are not, too."""
        if not self.mismatched:
            return there, made
        if len(real.cond) <= self.draws:
            raise ValueError("adversary.mismatched exchanges prompts within a batch; give settings.batch at least 2")
        others = torch.arange(len(real.cond), device=real.x_t.device).roll(-1)
        wrong = self._judged(nets, replace(real, cond=real.cond[others]))
        return torch.cat([there, there]), torch.cat([made, wrong])

    def _moved(self, clip: Shown, rng: Rng, name: str) -> Shown:
        return replace(clip, x_t=clip.x_t + self.rho * rng.randn(clip.x_t.shape, name))
