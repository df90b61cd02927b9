"""DDIM: the deterministic first-order step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True)
class DDIM(Sampler):
    """First-order step `a_s x0 + s_s eps` (2010.02502). Order 1; exact when x0 and eps are constant."""

    def move(self, here: Here) -> Tensor:
        x0 = here.prediction.x0
        return x0 if here.ends else here.finished(here.prediction.step_to(here.at_s()), clean=x0)
