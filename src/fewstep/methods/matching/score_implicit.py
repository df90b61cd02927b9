"""A distance of the scores, weighted alike for all clips: score implicit matching (SIM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewstep.core.bounds import Positive, require_bounds
from fewstep.diffusion.path import broadcast
from fewstep.methods.matching.base import Matching, Noised, Scores, kept


@dataclass(frozen=True, kw_only=True)
class ScoreImplicit(Matching):
    """A distance of the scores, followed without its critic's own gradient: score implicit matching (SIM, 2410.16794, eq. 6).

    `- u . (fake - x0)`, with `u = y / sqrt(|y|^2 + c^2)`, `y = fake - real`, one norm per clip: the pseudo-Huber distance, which
    weighs all clips alike. With `distance: l2`, u = y, it is `Fisher(alpha=1, weight="one")`.
    """

    through: ClassVar[bool] = True

    distance: Literal["pseudo_huber", "l2"] = "pseudo_huber"
    c: Positive = 0.00054
    """Constant of the pseudo-Huber distance, times the square root of the number of elements (iCT's rule)."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        real, fake = scores.real(noised.x_t, noised.t), scores.fake(noised.x_t, noised.t)
        gap = fake - real
        if self.distance == "pseudo_huber":
            elements = gap[0].numel()
            norm = (gap.square().flatten(1).sum(1) + self.c**2 * elements).sqrt()
            gap = gap / broadcast(norm / elements**0.5, gap)  # per element of size 1, whatever the clip's size
        return kept(-gap * (fake - noised.x0), keep).mean()
