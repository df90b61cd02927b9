"""Stored states of the teacher as the student's input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fewstep.core import Batch, Pairs, Rng
from fewstep.methods.rollouts.base import Rolled, Rollout, pick, predict
from fewstep.methods.rollouts.grids import NESTED, Grids, exact
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class FromPairs(Rollout):
    """Stored states of the teacher's ODE as input, at one time of the grids per sample. All these times must be stored.

    Both sampling modes may be used.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    grids: Grids = NESTED

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        pairs: Pairs = batch.require("pairs")
        stored = [stored_index(pairs, t) for grid in exact(self.grids, self.shift) for t in grid]
        drawn = rng.integers((len(batch),), "index", len(stored))
        index = torch.tensor(stored, device=drawn.device)[drawn]
        x_t = pairs.states[torch.arange(len(batch), device=index.device), index]
        return predict(student, x_t, pick(pairs.times, index, x_t), batch, grad)


def stored_index(pairs: Pairs, t: float) -> int:
    for i, stored in enumerate(pairs.times):
        if math.isclose(stored, t, abs_tol=1e-6):
            return i
    raise ValueError(f"time {t:.6g} was not stored; the pairs hold {list(pairs.times)}. Store a grid that contains it.")
