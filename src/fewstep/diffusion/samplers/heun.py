"""Heun's method on the flow: two calls per step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True)
class Heun(Sampler):
    """Trapezoidal corrector on `dx/dt` (2206.00364, algorithm 1). Order 2; two calls per step, one in the last."""

    def calls(self, steps: int) -> int:
        return 2 * steps - 1

    def move(self, here: Here) -> Tensor:
        x, dt, flow = here.x, here.dt, here.prediction.flow
        ahead = here.kept(x + dt * flow)
        if here.ends:
            return ahead
        there = here.denoise(ahead, here.at_s(), here.call).flow
        return here.finished(x + dt * ((flow + there) / 2), clean=ahead)
