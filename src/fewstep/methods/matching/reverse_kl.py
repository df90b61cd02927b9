"""Reverse KL: follow the difference of the two scores (Diff-Instruct, DMD, DMD2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.bounds import Amount, require_bounds
from fewstep.methods import targets
from fewstep.methods.matching.base import Matching, Noised, Scores
from fewstep.methods.motion import motion_matching

Weight = Literal["distance", "one", "exact"]


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Matching):
    """The gradient of KL(student_t | teacher_t), with a weight for each time (DMD2, 2405.14867; Diff-Instruct, 2305.18455).

    No gradient goes through teacher and critic.
    """

    weight: Weight = "distance"
    """Weight of `critic - teacher` in x0: `distance` is DMD's, one over the distance of teacher and sample (2311.18828, eq. 8);
    `one` is Diff-Instruct's public code; `exact`, `a^2 / s^2`, is the KL itself, which grows without bound at low noise."""

    motion: Amount = 0.0
    """Weight of the same on differences of neighbouring frames (Diagonal Distillation, 2603.09488: 0.2); 0: off."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            real, fake = scores.real(noised.x_t, noised.t), scores.fake(noised.x_t, noised.t)
        loss = targets.distribution_matching(noised.x0, real, fake, weight_of(self.weight, noised, scores), keep=keep)
        return loss + self.motion * motion_matching(noised.x0, real, fake) if self.motion > 0 else loss


def weight_of(weight: Weight, noised: Noised, scores: Scores) -> Tensor | None:
    """`[B]` or `[B, F]` for `targets.distribution_matching`; None: its own, DMD's."""
    match weight:
        case "distance":
            return None
        case "one":
            return torch.ones_like(noised.t)
    c = scores.teacher.path.coeffs(noised.t)
    return (c.a / c.s) ** 2
