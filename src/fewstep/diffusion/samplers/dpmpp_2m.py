"""DPM-Solver++(2M): second order with one call per step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M) (2211.01095, algorithm 2): order 2 with one call per step, in `lambda = log(a/s)`.

    The first step is of first order, and so is the last, where lambda is infinite: from pure noise to data, on a grid
    uniform in t, the order is therefore between 1.5 and 2.
    """

    def move(self, here: Here) -> Tensor:
        x0, path, x = here.prediction.x0, here.prediction.path, here.x.double()
        if here.ends:
            return x0
        now, there = path.at(here.prediction.t, x), path.at(here.at_s(), x)
        lam, lam_next = (now.a / now.s).log(), (there.a / there.s).log()
        blend = x0
        if here.before is not None:
            past = path.at(here.before.t, x)
            lam_past = (past.a / past.s).log()
            ratio = (lam - lam_past) / (lam_next - lam)
            known = lam_past.isfinite() & (lam_past != lam)  # a frame that has not moved yet has no past
            blend = torch.where(known, x0 + ((x0 - here.before.x0) / (2 * ratio)).to(x0.dtype), x0)
        moved = (there.s / now.s) * here.x - there.a * torch.expm1(-(lam_next - lam)) * blend
        return here.finished(moved.to(x0.dtype), clean=x0)
