"""Fisher divergence of student and teacher: SiD, guided SiD, few-step SiD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewstep.core.bounds import Amount, require_bounds
from fewstep.diffusion.path import broadcast
from fewstep.methods import targets
from fewstep.methods.matching.base import Matching, Noised, Scores, kept


@dataclass(frozen=True, kw_only=True)
class Fisher(Matching):
    """Fisher divergence of student and teacher: score identity distillation (SiD, 2404.04057, eq. 23; few steps: 2505.12674).

    `w (real - fake) . ((real - x0) - alpha (real - fake))`, with gradient in the student's clip, and through teacher and critic.
    The weight w has none.
    """

    through: ClassVar[bool] = True

    alpha: Amount = 1.0
    """1: `(real - fake) . (fake - x0)`. Above 1 (1.2 on ImageNet) the squared distance itself, whose gradient is biased by the
    critic's error, is taken off."""

    weight: Literal["distance", "one"] = "distance"
    """w: one over the distance of sample and teacher, or 1."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        real, fake = scores.real(noised.x_t, noised.t), scores.fake(noised.x_t, noised.t)
        gap = real - fake
        each = gap * ((real - noised.x0) - self.alpha * gap)
        if self.weight == "distance":
            each = broadcast(targets.dmd_normaliser(noised.x0, real.detach()), each) * each
        return kept(each, keep).mean()
