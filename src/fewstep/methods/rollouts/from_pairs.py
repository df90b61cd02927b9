"""Stored states of the teacher as the student's input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core import Batch, Pairs, Rng
from fewstep.diffusion import Contract
from fewstep.methods.histories import History, TeacherForced, WholeClip
from fewstep.methods.rollouts.base import Rolled, Rollout, pick, predict
from fewstep.methods.rollouts.grids import NESTED, Grids, exact
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class FromPairs(Rollout):
    """Stored states of the teacher's ODE as input, at one time of the grids per sample. All these times must be stored.

    Both sampling modes may be used.
    """

    grids: Grids = NESTED
    history: History = WholeClip()
    """What is read of earlier chunks, for a student that streams: their stored states at times of their own (`DiffusionForced`,
    CausVid's ODE initialisation, 2412.07772), or clean ones (`TeacherForced`): of pairs of a causal teacher the clips that the
    teacher itself had read (Causal Forcing, 2602.02214), of others the endpoints."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        pairs: Pairs = batch.require("pairs")
        stored = [stored_index(pairs, t) for grid in exact(self.grids, self.shift) for t in grid]
        clean = self._clean(pairs)
        drawn = self.history.index(len(stored), clean, rng)
        index = torch.tensor([*stored, len(pairs.times) - 1], device=drawn.device)[drawn]
        x_t = states_at(pairs.states, index)
        return predict(self.history.over(student, clean), x_t, pick(pairs.times, index, x_t), batch, grad)

    def check(self, rollout: Rollout) -> None:
        """Refuse (ValueError) to train a student on stored states that makes clips in another way, or in other chunks."""
        streams = (self.history.stream, rollout.contract(Contract()).stream)
        own, other = (None if stream is None else stream.chunks for stream in streams)
        if own != other:
            raise ValueError(
                f"stored states train a student of {_ways(own)}, and the method's rollout ({type(rollout).__name__}) one of "
                f"{_ways(other)}; give both the same stream (anchor_rollout.history), or write anchor: 0"
            )

    def _clean(self, pairs: Pairs) -> Tensor:
        """The clips whose clean chunks may be read: those that the teacher read. ValueError if this history reads something else:
        a state of a causal teacher has an endpoint only together with them."""
        if pairs.past is None:
            return pairs.states[:, -1]
        forced = isinstance(self.history, TeacherForced)
        chunks = self.history.stream.lengths(pairs.states.shape[3]) if forced else ()
        if chunks != pairs.past.chunks:
            raise ValueError(
                f"these pairs are of a teacher that read clean chunks of {list(pairs.past.chunks)} latent frames before each "
                f"chunk; write rollout.history: {{type: TeacherForced, stream: ...}} with these chunks, not "
                f"{type(self.history).__name__} with {list(chunks) or 'others'}"
            )
        return pairs.past.clips

    @property
    def calls(self) -> float:
        return self.history.calls

    @property
    def work(self) -> float:
        return 3 * self.history.calls

    def contract(self, teacher: Contract) -> Contract:
        return self.history.contract(super().contract(teacher))


def states_at(states: Tensor, index: Tensor) -> Tensor:
    """`[B, C, F, H, W]` of `[B, T+1, C, F, H, W]`: of each clip the state `index` `[B]`, or of each of its frames `[B, F]`."""
    clips = torch.arange(len(states), device=index.device)
    if index.ndim == 1:
        return states[clips, index]
    frames = torch.arange(states.shape[3], device=index.device)
    return states[clips[:, None], index, :, frames].transpose(1, 2)


def stored_index(pairs: Pairs, t: float) -> int:
    for i, stored in enumerate(pairs.times):
        if math.isclose(stored, t, abs_tol=1e-6):
            return i
    raise ValueError(f"time {t:.6g} was not stored; the pairs hold {list(pairs.times)}. Store a grid that contains it.")


def _ways(chunks: tuple[int, ...] | None) -> str:
    """How a student makes its clips, in words; None: not in chunks."""
    return "whole clips" if chunks is None else f"chunks of {list(chunks)} latent frames"
