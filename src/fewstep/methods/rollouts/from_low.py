"""The latents of a low-resolution clip as the student's input, which it makes sharp in one step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Fraction, Part, require_bounds
from fewstep.diffusion import CFG, Contract, FromVideo, Stream, Trained, shifted
from fewstep.diffusion.samplers import full
from fewstep.methods.rollouts.base import Rolled, Rollout, predict
from fewstep.methods.rollouts.grids import Grids
from fewstep.models.by_chunk import ByChunk
from fewstep.models.denoiser import Predictor
from fewstep.streaming.video import begun


@dataclass(frozen=True, kw_only=True)
class FromLow(Rollout):
    """The low-resolution clip, scaled up and encoded, stands for latents of one time (DOVE, 2505.16239). One step.

    The same start is the student's in sampling: it begins with a video (`FromVideo`).
    """

    grids: Grids = ((0.4,),)
    """The time, alone (DOVE: 0.4). High times leave more to the student, low ones stay closer to what is given."""
    noise: Part | None = 0.0
    """Time of the noise that the latents are given before; 0: none (DOVE). null: the time itself, so that a teacher knows such
    latents, too."""
    cond_drop: Fraction = 0.5
    """Share of the clips whose prompt the student is not told, so that a video without a caption can be given, too (DOVE: 1)."""
    stream: Stream | None = None
    """How clips are made chunk by chunk, where a chunk reads what the calls of earlier ones left (`commit: last`): then all
    chunks are trained in one call (FlashVSR, 2510.12747). null: whole clips."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if len(self.grids) != 1 or len(self.grids[0]) != 1 or not 0 < self.grids[0][0] <= 1:
            raise ValueError(
                f"grids has one time above 0, and 1 at most, because FromLow makes one step; write [[0.4]], not "
                f"{[list(grid) for grid in self.grids]}"
            )
        if self.noise is None and self.time >= 1:
            raise ValueError(
                f"noise: null is the noise of the time in grids, {self.grids[0][0]}, at which nothing is left of the low clip; "
                "give grids a time below 1, or noise a number below 1, such as 0"
            )
        if self.noise is not None and self.noise > self.time:
            raise ValueError(
                f"noise {self.noise} is above the time {self.time} in grids, which the network is told; write noise: null for "
                "as much noise as that time has, or less"
            )
        if self.stream is not None and (self.stream.commit != "last" or self.stream.rolling > 1):
            raise ValueError(
                "chunks of FromLow read what the calls of earlier chunks left; write stream.commit: last, and leave rolling "
                f"out; got commit {self.stream.commit} and rolling {self.stream.rolling}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"low"})

    @property
    def time(self) -> float:
        """The time, shifted."""
        return float(shifted(torch.tensor(self.grids[0][0], dtype=torch.float64), self.shift))

    @property
    def ends(self) -> set[float]:
        return {self.time}

    @property
    def grid(self) -> FromVideo:
        """Where sampling begins, in training and afterwards."""
        return FromVideo(time=self.time, noise=self.time if self.noise is None else self.noise)

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        low = batch.require("low")
        noise = rng.randn(low.shape, "noise").to(low.dtype)
        x_t = begun(low, noise, student.path, self.grid, self.time)
        network = student if self.stream is None else ByChunk(student, self.stream)
        told = rng.rand((len(low),), "told") >= self.cond_drop
        batch = replace(batch, cond=batch.cond.where(told, batch.uncond))
        return predict(network, x_t, full(self.time, low), batch, grad, noise=noise, grid=(self.time,))

    def contract(self, teacher: Contract) -> Contract:
        grid = Trained(grid=self.grid, steps=(1,))
        return replace(teacher, grid=grid, sampler=self.sampler, steps=1, guidance=CFG(), stream=self.stream)
