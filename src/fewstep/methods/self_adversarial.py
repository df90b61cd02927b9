"""Match a student's clips of few steps to its own of more steps with a discriminator, and to the teacher through scores.

Yang et al., Towards One-step Causal Video Generation via Adversarial Self-Distillation (ASD), 2511.01419.

    n = the step counts of `rollout`, in turn; n' = the next larger one
    repeat critic_updates times:
    1    y = student in n steps, y' = student in n' steps, both from one noise               (no gradient)
    2    critic: minimise |critic(y_t, t, c) - target(y, eps)|^2
    3    discriminator: minimise (D_n(y'_t, t, c) - D_n(y_t, t, c) - 1)^2                    (the same t and eps for y and y')
    4  y, y' as in line 1                                              (gradient through the last call that makes y, only)
    5  g = (critic(y_t) - guided teacher(y_t)) / mean|y - guided teacher(y_t)|;  put g on y
    6  + adversarial * (D_n(y_t) - D_n(y'_t))^2

The largest step count has no n': lines 1, 2, 4 and 5, as in DMD2. One student serves all step counts, and `Stream.steps` of its
contract gives its first chunk more of them (first-frame enhancement).

Not from the paper, which says that D_n tells y from y' and no more: lines 3 and 6, lambda, and counts in turn, not at random. A
relativistic softplus, which its figure suggests, pushes y on where y = y' (slope 1/2); squares of a pair do not, whatever D_n is;
nor would y equal y' with noises of their own. D_n are heads on frozen teacher features, not the critic's. `r1` is on both clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Batch, Cond, Losses, Rng
from fewstep.core.bounds import Amount, Count, Natural, Part, Positive, require_bounds
from fewstep.diffusion import CFG, TimeDensity, Uniform
from fewstep.methods import gan, targets
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.matching import Noised, ReverseKL, Scores
from fewstep.methods.roles import Copy, Heads, Role
from fewstep.methods.rollouts import NESTED, BackwardSimulation, Rollout, SelfForced
from fewstep.methods.turns import in_turns
from fewstep.methods.work import Work


@dataclass(frozen=True, kw_only=True)
class SelfAdversarial(Method):
    """Adversarial self-distillation (ASD), with distribution matching."""

    cite: ClassVar[str] = (
        "Yang et al., Towards One-step Causal Video Generation via Adversarial Self-Distillation, 2511.01419"
    )
    rollout: Rollout = SelfForced(grids=NESTED)
    """How samples are made, to the last step: `SelfForced` or `BackwardSimulation`, with a grid for each step count."""
    guidance: CFG = CFG(scale=3.0)
    """Guidance of the teacher; it is distilled into the student. The critic uses none."""
    adversarial: Amount = 0.03
    """lambda: weight of line 6 under mean reduction."""
    critic_updates: Count = 5
    """Updates of critic and discriminator per student update, all in one iteration."""
    warmup: Natural = 0
    """First iterations, which train only critic and discriminator."""
    align: Part = 0.0
    """Share of the student's weights that the critic takes after each update of the student (SenseFlow: 0.03); 0: none."""
    score_density: TimeDensity = Uniform(low=0.02, high=0.98)
    """Density of t for the score difference, and for the discriminator."""
    critic_density: TimeDensity = Uniform()
    """Density of t for the critic's training."""
    r1: Amount = 0.0
    """Weight of the approximate R1 penalty on the discriminator, the mean over both clips; 0: off."""
    rho: Positive = 0.1
    """Size of the perturbation of the noised latents in the R1 penalty."""
    layers: tuple[int, ...] = (-1,)
    """Teacher blocks whose features the discriminator reads, with heads of their own for each step count but the largest."""

    def __post_init__(self) -> None:
        require_bounds(self)
        own = isinstance(self.rollout, SelfForced) and self.rollout.stream.steps
        if not isinstance(self.rollout, SelfForced | BackwardSimulation) or len(set(self.rollout.grids)) < 2 or own:
            raise ValueError(
                "clips of two step counts are compared: rollout is SelfForced or BackwardSimulation, with grids of at least two "
                f"step counts, for all chunks (no stream.steps); got {type(self.rollout).__name__} with {self.rollout.grids}"
            )
        if not self.layers or getattr(self.rollout, "phase", None) is not None:
            raise ValueError("give at least one layer of the teacher, such as -1, and no rollout.phase: clips end at 0")

    @property
    def grids(self) -> tuple[Rollout, ...]:
        """The rollouts of each step count to its end, fewest steps first."""
        grids = sorted(set(self.rollout.grids), key=len)
        return tuple(replace(self.rollout, grids=(grid,), exit="last") for grid in grids)  # type: ignore[call-arg]

    def aux(self) -> dict[str, Role]:
        return {"critic": Copy("teacher"), "discriminator": Heads("teacher", self.layers * (len(self.grids) - 1))}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        n = step % len(self.grids)
        trained = ("critic", "discriminator") if n + 1 < len(self.grids) else ("critic",)
        turns = [Update(trained, partial(self.critic_loss, n, k)) for k in range(self.critic_updates)]
        own = Update(("student",), partial(self.student_loss, n))
        return in_turns(step, turns, own, warmup=self.warmup, align=self.align)

    def critic_loss(self, n: int, turn: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold(f"critic/{turn}")  # new samples in every turn
        y, more = self.pair(n, nets, batch, rng, grad=False)  # 1
        eps, t = rng.randn(y.shape, "eps"), self.critic_density.sample(len(y), rng.fold("critic"))
        y_t = nets.critic.path.add_noise(y, eps, t)
        losses = {"denoising": targets.denoising(nets.critic(y_t, t, batch.cond), y, eps)}  # 2
        if more is not None:
            s = self.score_density.sample(len(y), rng)
            shown = [nets.teacher.path.add_noise(x, eps, s) for x in (more, y)]
            moved = [x + self.rho * rng.randn(y.shape, "r1") for x in shown] if self.r1 > 0 else []
            real, fake, *near = (self.logits(n, nets, x, s, batch.cond) for x in (*shown, *moved))
            losses["discriminator"] = gan.paired_discriminator(real, fake)  # 3
            if near:
                losses["r1"] = self.r1 * gan.approximate_r1(torch.cat([real, fake]), torch.cat(near))
        yield losses

    def student_loss(self, n: int, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Losses]:
        rng = rng.fold("student")
        y, more = self.pair(n, nets, batch, rng, grad=True)  # 4
        eps, t = rng.randn(y.shape, "eps"), self.score_density.sample(len(y), rng)
        y_t = nets.teacher.path.add_noise(y, eps, t)
        scores = Scores(nets.teacher, nets.critic, self.guidance, batch.cond, batch.uncond)
        losses = {"matching": ReverseKL().loss(Noised(y, y_t, t, eps), scores)}  # 5
        if more is not None:
            here = self.logits(n, nets, y_t, t, batch.cond)
            with torch.no_grad():
                there = self.logits(n, nets, nets.teacher.path.add_noise(more, eps, t), t, batch.cond)
            losses["adversarial"] = self.adversarial * gan.paired_generator(here, there)  # 6
        yield losses

    def pair(self, n: int, nets: Nets, batch: Batch, rng: Rng, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Clips `[B, C, F, H, W]` of the n-th step count, and of the next larger one, from the same random numbers."""
        y = self.grids[n](nets.student, batch, rng, grad=grad).x0
        return y, (self.grids[n + 1](nets.student, batch, rng, grad=False).x0 if n + 1 < len(self.grids) else None)

    def logits(self, n: int, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """D_n: the heads are those of D_1, then those of D_2, and so on. Gradients flow through the frozen features to `x_t`."""
        taps = nets.teacher.features(x_t, t, cond, self.layers) * (len(self.grids) - 1)
        return nets.discriminator(taps)[:, n * len(self.layers) : (n + 1) * len(self.layers)]

    def cost(self) -> tuple[Work, ...]:
        turns, views, pairs = self.critic_updates, 4 if self.r1 > 0 else 2, (len(self.grids) - 1) / len(self.grids)
        every, more = fmean(each.calls for each in self.grids), fmean(each.calls for each in self.grids[1:])
        return (
            Work("student", turns * every + fmean(each.work for each in self.grids) + (turns + 1) * pairs * more),
            Work("teacher", self.guidance.passes),
            Work("critic", 3 * turns + 1),
            Work("teacher", pairs * (views * turns + 3), layers=self.layers),
        )
