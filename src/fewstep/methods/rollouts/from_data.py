"""Noised data as the student's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewstep.core import Batch, Rng
from fewstep.methods.rollouts.base import Rolled, Rollout, pick, predict
from fewstep.methods.rollouts.grids import exact
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class FromData(Rollout):
    """Data with added noise as input, at one time of the grids per sample. Cheap, but sampling gives the student inputs that
    it has not seen in training."""

    needs: ClassVar[frozenset[str]] = frozenset({"x0"})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        x0, times = batch.require("x0"), [t for grid in exact(self.grids, self.shift) for t in grid]
        t = pick(times, rng.integers((len(batch),), "index", len(times)), x0)
        noise = rng.randn(x0.shape, "noise")
        return predict(student, student.path.add_noise(x0, noise, t), t, batch, grad, noise=noise)
