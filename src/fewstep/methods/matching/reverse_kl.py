"""Reverse KL: follow the difference of the two scores (Diff-Instruct, DMD, DMD2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.core.bounds import Amount, require_bounds
from fewstep.diffusion import CFG, NoisePath
from fewstep.methods import targets
from fewstep.methods.matching.base import Matching, Noised, Point, Scores
from fewstep.methods.motion import motion_matching

Weight = Literal["distance", "one", "exact"]


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Matching):
    """The gradient of KL(student_t | teacher_t), with a weight for each time (DMD2, 2405.14867; Diff-Instruct, 2305.18455; VSD).

    No gradient goes through teacher and critic.
    """

    weight: Weight = "distance"
    """Weight of `critic - teacher` in x0: `distance` is DMD's, one over the distance of teacher and sample (2311.18828, eq. 8);
    `one` is Diff-Instruct's public code; `exact`, `a^2 / s^2`, is the KL itself, which grows without bound at low noise."""

    motion: Amount = 0.0
    """Weight of the same, by `distance`, on differences of frames (Diagonal Distillation, 2603.09488: 0.2); 0: off."""

    decoupled: bool = False
    """Whether guidance is read apart, at a time of its own below that of the student's input (Decoupled DMD, 2511.22677):
    `fake - cond` at x_t, minus `(scale - 1) (cond - uncond)` at that time. One more call of the teacher. Ours: the time is
    uniform, and one weight is for both."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.decoupled and self.weight == "exact":
            raise ValueError(
                "weight exact is that of one time, and decoupled guidance has another; set weight to distance or one"
            )

    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        if self.decoupled != (noised.guided_at is not None):
            raise ValueError("decoupled guidance needs the point where it is read; give Noised what `guided_at` makes")
        with torch.no_grad():
            fake, apart = scores.fake(noised.x_t, noised.t), noised.guided_at
            real = (
                scores.real(noised.x_t, noised.t)
                if apart is None
                else scores.real_guided_at(noised.x_t, noised.t, apart)
            )
        loss = targets.distribution_matching(noised.x0, real, fake, weight_of(self.weight, noised, scores), keep=keep)
        return loss + self.motion * motion_matching(noised.x0, real, fake, keep) if self.motion > 0 else loss

    def guided_at(self, x_s: Tensor, path: NoisePath, s: Tensor, below: Tensor, rng: Rng) -> Point | None:
        if not self.decoupled:
            return None
        top = below if below.ndim == 1 else below.amin(1)  # cleaner than every frame of the student's input
        t = s + (top - s) * rng.rand((len(x_s),), "guidance/time").to(s)
        a, b = path.between(s, t, x_s)
        return Point(a * x_s + b * rng.randn(x_s.shape, "guidance/eps").to(x_s), t)

    def check(self, guidance: CFG, *, stills: bool = False) -> None:
        if stills and self.motion > 0:
            raise ValueError("matching.motion compares frames of one clip, and single frames are shown; set it to 0")
        if self.decoupled and not (guidance.guided and guidance.passes == 2):
            raise ValueError(
                "matching.decoupled reads the guidance of prompt and negative prompt apart: a CFG with a scale other than 1; got "
                f"{guidance}; set guidance.scale, or decoupled: false"
            )

    def teacher_calls(self, guidance: CFG) -> int:
        return super().teacher_calls(guidance) + self.decoupled


def weight_of(weight: Weight, noised: Noised, scores: Scores) -> Tensor | None:
    """`[B]` or `[B, F]` for `targets.distribution_matching`; None: its own, DMD's."""
    match weight:
        case "distance":
            return None
        case "one":
            return torch.ones_like(noised.t)
    c = scores.teacher.path.coeffs(noised.t)
    return (c.a / c.s) ** 2
