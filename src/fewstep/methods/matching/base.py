"""What brings the student's distribution to the teacher's, given the predictions of the teacher (real) and of the critic (fake).

Distillation by scores has one loop: sample the student, let a critic learn its distribution, compare critic and teacher on noised
samples. The papers differ in how the comparison becomes a loss. That is a `Matching`, held by the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.core import Call, Cond, Rng
from fewstep.diffusion import CFG, NoisePath
from fewstep.diffusion.path import broadcast
from fewstep.models.denoiser import Predictor


class Point(NamedTuple):
    """Latents `[B, C, F, H, W]` with noise, and their time, `[B]`."""

    x_t: Tensor
    t: Tensor


@dataclass(frozen=True)
class Noised:
    """A student's clip with noise: `x_t = a x0 + s eps`. `x0` and `x_t` are `[B, C, F, H, W]` and carry its gradient."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    guided_at: Point | None = None
    """The clip with noise of its own, where the teacher's guidance is read (`Matching.guided_at`); None: at `x_t`."""


@dataclass(frozen=True)
class Scores:
    """Teacher and critic on noised clips. Their weights are frozen here; a prediction has a gradient in `x_t` unless the caller
    says no_grad."""

    teacher: Predictor
    critic: Predictor
    guidance: CFG
    """Guidance of the teacher."""
    cond: Cond
    uncond: Cond
    critic_guidance: CFG = CFG()
    """Guidance of the critic."""
    logits: Callable[[Tensor, Tensor], Tensor] | None = None
    """The discriminator on `(x_t, t)`: `[B, heads]`; None: the method has none."""

    def real(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The guided teacher's x0."""
        return self.guidance(self.teacher, x_t, t, self.cond, self.uncond).x0

    def real_guided_at(self, x_t: Tensor, t: Tensor, at: Point) -> Tensor:
        """The teacher's x0 for the prompt alone, and what guidance adds elsewhere: `cond(x_t) + (w - 1) (cond - uncond)(at)`."""
        guided, alone = self.guidance.beside(self.teacher, *at, self.cond, self.uncond, Call(), "one")
        return self.teacher(x_t, t, self.cond).x0 + guided.x0 - guided.with_raw(alone).x0

    def fake(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The critic's x0."""
        return self.critic_guidance(self.critic, x_t, t, self.cond, self.uncond).x0


class Matching(ABC):
    """How two predictions become the student's loss. A frozen dataclass."""

    through: ClassVar[bool] = False
    """Whether the gradient goes through teacher and critic, which then keep their activations."""
    judged: ClassVar[bool] = False
    """Whether it reads the discriminator."""

    @abstractmethod
    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        """Mean over all elements. `keep`, `[B]` or `[B, F]` of mean 1, says how much each clip or frame counts."""

    def noised(self, x0: Tensor, path: NoisePath, t: Tensor, eps: Tensor, below: Tensor, rng: Rng) -> Noised:
        """The student's clips with noise `eps` at the times t, and where guidance is read besides (`guided_at`)."""
        return Noised(x0, path.add_noise(x0, eps, t), t, eps, self.guided_at(x0, path, torch.zeros_like(t), below, rng))

    def guided_at(self, x_s: Tensor, path: NoisePath, s: Tensor, below: Tensor, rng: Rng) -> Point | None:
        """Where guidance is read, if not at `Noised.x_t`: the student's latents `x_s` of time s `[B]` with more noise, at a time
        below that of the student's input, `[B]` or `[B, F]`."""
        return None

    def check(self, guidance: CFG, *, stills: bool = False) -> None:  # noqa: B027 - most matchings take anything
        """Refuse (ValueError) a guidance of the teacher, or single frames (`stills`), that the matching cannot follow."""

    def teacher_calls(self, guidance: CFG) -> int:
        """Forward-equivalents of the teacher in one loss."""
        return (1 + self.backward) * guidance.passes

    @property
    def backward(self) -> int:
        """Forward-equivalents of the backward pass through each network that it calls: 1 (to the input alone), or 0."""
        return 1 if self.through else 0


def kept(each: Tensor, keep: Tensor | None) -> Tensor:
    """`each` element, by how much its clip or frame counts."""
    return each if keep is None else broadcast(keep, each) * each
