"""Any f-divergence: reverse KL weighted by the density ratio of data and student (f-distill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.bounds import Positive, require_bounds
from fewstep.diffusion.path import broadcast
from fewstep.methods import targets
from fewstep.methods.matching.base import Matching, Noised, Scores
from fewstep.methods.matching.reverse_kl import Weight, weight_of

Divergence = Literal["reverse_kl", "forward_kl", "js", "jeffreys", "hellinger", "softened_rkl", "neyman"]


@dataclass(frozen=True, kw_only=True)
class FDivergence(Matching):
    """The gradient of an f-divergence from student to teacher: DMD's, times `h(r) = f''(r) r^2` (f-distill, 2502.15681, eq. 6).

    r is the ratio of data to student density, read from the discriminator: `r = exp(logit)`, mean of its heads. Because the
    discriminator compares with data, the data should be like the teacher's samples. `reverse_kl` is DMD2, bit for bit. Not as
    published: h is divided by its mean in the batch alone, not also by a running mean for each range of times.
    """

    judged: ClassVar[bool] = True

    kind: Divergence = "js"
    weight: Weight = "distance"
    """Weight for each time, as in `ReverseKL`."""
    low: Positive = 0.1
    """Smallest ratio that counts; `high` the largest (both as in FastGen). Forward KL weights by the ratio itself, whose variance
    is large."""
    high: Positive = 20.0

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    @property
    def least_batch(self) -> int:
        """Fewest clips of a batch, whose weights have mean 1."""
        return 1 if self.kind == "reverse_kl" else 2

    def loss(self, noised: Noised, scores: Scores, keep: Tensor | None = None) -> Tensor:
        if scores.logits is None:
            raise ValueError(
                "an f-divergence reads a discriminator, and this method has none; set its adversarial weight"
            )
        with torch.no_grad():
            real, fake = scores.real(noised.x_t, noised.t), scores.fake(noised.x_t, noised.t)
            if self.kind != "reverse_kl":
                h = self.weights(scores.logits(noised.x_t, noised.t))
                keep = h if keep is None else broadcast(h, keep) * keep
        return targets.distribution_matching(noised.x0, real, fake, weight_of(self.weight, noised, scores), keep=keep)

    def weights(self, logits: Tensor) -> Tensor:
        """`h(r)` over its mean in the batch, `[B]`, of logits `[B, heads]`. ValueError for a single clip, always at 1."""
        if len(logits) == 1:
            raise ValueError(
                "f-divergences weigh the clips of a batch against each other; give settings.batch at least 2"
            )
        h = self.h(logits.mean(1).exp().clamp(self.low, self.high))
        return h / h.mean()

    def h(self, r: Tensor) -> Tensor:
        """`f''(r) r^2`."""
        match self.kind:
            case "reverse_kl":
                return torch.ones_like(r)
            case "forward_kl":
                return r
            case "js":
                return r / (1 + r)
            case "jeffreys":
                return 1 + r
            case "hellinger":
                return r.sqrt()
            case "softened_rkl":
                return 1 / (1 + r)
            case "neyman":
                return 1 / r
        raise ValueError(f"f-divergence {self.kind!r} is unknown")
