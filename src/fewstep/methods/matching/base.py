"""What brings the student's distribution to the teacher's, given the predictions of the teacher (real) and of the critic (fake).

Distillation by scores has one loop: sample the student, let a critic learn its distribution, compare critic and teacher on noised
samples. The papers differ in how the comparison becomes a loss. That is a `Matching`, held by the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core import Cond
from fewstep.diffusion import CFG
from fewstep.diffusion.path import broadcast
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True)
class Noised:
    """A student's clip with noise: `x_t = a x0 + s eps`. `x0` and `x_t` are `[B, C, F, H, W]` and carry its gradient."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor


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

    @property
    def backward(self) -> int:
        """Forward-equivalents of the backward pass through each network that it calls: 1 (to the input alone), or 0."""
        return 1 if self.through else 0


def kept(each: Tensor, keep: Tensor | None) -> Tensor:
    """`each` element, by how much its clip or frame counts."""
    return each if keep is None else broadcast(keep, each) * each
