"""Renoising: predict clean latents, add fresh noise, repeat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True)
class Renoise(Sampler):
    """Predict x0, add fresh noise of the next time, repeat (LCM, DMD2). The noise of step i is named `renoise/i`."""

    @property
    def deterministic(self) -> bool:
        return False

    def move(self, here: Here) -> Tensor:
        x0 = here.prediction.x0
        if here.ends:
            return x0
        fresh = here.rng.randn(x0.shape, f"renoise/{here.call.step}")
        return here.finished(here.prediction.path.add_noise(x0, fresh, here.at_s()), clean=x0)
