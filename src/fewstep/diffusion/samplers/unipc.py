"""UniPC: a multistep predictor, each of whose steps the next call corrects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core import Call, Noise
from fewstep.diffusion.path import broadcast
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.samplers.base import Denoise, Here, Sampler, Step, Times, full


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniPC-2 (2302.04867) on x0, in `lambda = log(a/s)`: order 3 with one call per step, where lambda is finite.

    A call first corrects the step that led to it (UniC, eq. 7 with p = 2), then the next step is predicted from the corrected
    latents (UniP, eq. 3). The call itself is not repeated. There is no step before the first one, so it is predicted with
    order 1 and corrected with order 2; the step to t = 0 gives x0. From pure noise, where lambda is infinite, limits are taken.
    """

    variant: Literal["bh1", "bh2"] = "bh2"
    """B(h) of the paper: `h` (bh1), or `exp(h) - 1` (bh2). bh1 has no limit at pure noise: a step from there is not corrected."""

    def __post_init__(self) -> None:
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant: {self.variant!r} is unknown; choose bh1 or bh2")

    def sampling(self, denoise: Denoise, x: Tensor, times: Times, *, rng: Noise) -> Iterator[Step]:
        before, earlier, start = None, None, x
        for index, (t, s) in enumerate(pairwise(times)):
            call = Call(step=index, steps=len(times) - 1, rng=rng)
            prediction = denoise(x, full(t, x), call)
            start = x if before is None else self._corrected(x, start, prediction, before, earlier)
            here = Here(start, t, s, prediction, before, call, denoise, rng)
            x, before, earlier = here.kept(self.move(here)), prediction, before
            yield Step(index, call.steps, prediction, x)

    def move(self, here: Here) -> Tensor:
        """The predictor UniP-2, of order 1 where no step is known before this one."""
        x0 = here.prediction.x0
        if here.ends:
            return x0
        step = _Interval.between(here.prediction, here.at_s())
        known, share, change = step.past(here.prediction, here.before)
        bend = torch.where(known, step.weight(self.variant) * share / 2 * change, 0.0)
        return here.finished((step.first_order(here.x, x0) - step.a * bend).to(x0.dtype), clean=x0)

    def _corrected(
        self, x: Tensor, start: Tensor, now: Prediction, before: Prediction, earlier: Prediction | None
    ) -> Tensor:
        """The corrector UniC: the step from `start`, where `before` was predicted, to `x`, where `now` was."""
        step = _Interval.between(before, now.t)
        known, share, change = step.past(before, earlier)
        weight, (first, second) = step.weight(self.variant), step.moments(self.variant)
        old = torch.where(known, (first - second) * share / (share - 1), 0.0)  # solves the 2 x 2 system of eq. 5
        new = torch.where(known, first - old, 0.5)
        bend = torch.where(known, old * share * change, 0.0) + new * (now.x0 - before.x0)
        moved = step.first_order(start, before.x0) - step.a * weight * bend
        return torch.where(step.h.isfinite() | (weight == -1), moved, x).to(x.dtype).where(step.runs, x)


class _Interval(NamedTuple):
    """A step in `lambda`, in float64, shaped to multiply latents. Of a frame that stands still, numbers that nobody reads."""

    a: Tensor
    """Signal at the end."""
    ratio: Tensor
    """Noise at the end by noise at the start."""
    lam: Tensor
    """Lambda at the start."""
    h: Tensor
    """Distance to lambda at the end."""
    runs: Tensor
    """Whether the frame moves, and not to t = 0."""

    @classmethod
    def between(cls, start: Prediction, end: Tensor) -> _Interval:
        now, there = start.path.at(start.t, start.raw.double()), start.path.at(end, start.raw.double())
        lam, lam_end = (now.a / now.s).log(), (there.a / there.s).log()
        runs = (lam_end != lam) & (broadcast(end, now.a) != 0)
        return cls(there.a, there.s / now.s, lam, torch.where(runs, lam_end - lam, 1.0), runs)

    def first_order(self, x: Tensor, x0: Tensor) -> Tensor:
        return self.ratio * x - self.a * torch.expm1(-self.h) * x0

    def past(self, here: Prediction, before: Prediction | None) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a step led here; h by its length, negative (`1 / r`); and how x0 was different at its start."""
        if before is None:
            return torch.zeros_like(self.runs), torch.zeros_like(self.h), torch.zeros_like(here.raw)
        then = here.path.at(before.t, here.raw.double())
        length = (then.a / then.s).log() - self.lam
        known = (length != 0) & self.lam.isfinite()
        return known, self.h / torch.where(known, length, 1.0), before.x0 - here.x0

    def weight(self, variant: str) -> Tensor:
        """B(-h)."""
        return -self.h if variant == "bh1" else torch.expm1(-self.h)

    def moments(self, variant: str) -> tuple[Tensor, Tensor]:
        """`n! phi_(n+1)(-h) (-h) / B(-h)` for n = 1, 2 (the right side of eq. 5)."""
        first = torch.expm1(-self.h) / -self.h - 1
        second = first / -self.h - 0.5
        return first / self.weight(variant), 2 * second / self.weight(variant)
