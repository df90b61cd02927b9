"""Noised data as the student's input."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core import Batch, Rng
from fewstep.diffusion import Contract
from fewstep.methods.histories import History, WholeClip
from fewstep.methods.rollouts.base import Rolled, Rollout, pick, predict
from fewstep.methods.rollouts.grids import exact
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class FromData(Rollout):
    """Data with added noise as input, at one time of the grids per sample. Cheap, but sampling gives the student inputs that
    it has not seen in training."""

    history: History = WholeClip()
    """What is read of earlier chunks, for a student that streams (CausVid: `DiffusionForced`, 2412.07772)."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        x0, times = batch.require("x0"), [t for grid in exact(self.grids, self.shift) for t in grid]
        index = self.history.index(len(times), x0, rng)
        t, noise = pick((*times, 0.0), index, x0), rng.randn(x0.shape, "noise")
        student = self.history.over(student, x0)
        return predict(student, student.path.add_noise(x0, noise, t), t, batch, grad, noise=noise)

    @property
    def calls(self) -> float:
        return self.history.calls

    @property
    def work(self) -> float:
        return 3 * self.history.calls

    def contract(self, teacher: Contract) -> Contract:
        return self.history.contract(super().contract(teacher))
