"""Euler's method on the flow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.samplers.base import Here, Sampler


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler on `dx/dt`. On rectified flow identical to DDIM; order 1 on every path."""

    def move(self, here: Here) -> Tensor:
        return here.x + here.dt * here.prediction.flow
