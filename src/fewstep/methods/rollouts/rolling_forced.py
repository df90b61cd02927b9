"""Rolling Forcing: the student is trained on the window of chunks that serves a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.core.bounds import Fraction
from fewstep.diffusion import Contract, Stream
from fewstep.methods.rollouts.base import Rolled, Rollout, Visit, aligned
from fewstep.methods.rollouts.grids import exact
from fewstep.methods.rollouts.self_forced import SelfForced
from fewstep.models.denoiser import Predictor
from fewstep.streaming.blocks import Chunks, Flying
from fewstep.streaming.noise import start_noise
from fewstep.streaming.rolling import Rolling

_COIN = 10**9
"""Sides of the coin that chooses between the two kinds of rollout."""


@dataclass(frozen=True, kw_only=True)
class RollingForced(Rollout):
    """The rolling window of a session, from its first call to its last (2509.25161; `streaming.rolling`).

    Of T steps, the calls w with w = r (mod T) carry gradient, for a random r that all processes share. A chunk is in the window
    for T calls in a row, so exactly one of them is among these, and its prediction there is the chunk: the trained windows tile
    the clip. What a call reads of other calls, through the latents or the memory, carries no gradient. A share of the rollouts
    makes one chunk after the other instead, as `SelfForced` with a random exit: one for all chunks, the authors' is one each.
    """

    stream: Stream = Stream(rolling=4)
    """How a clip is made, in training and afterwards; `rolling` is the number of chunks in the window."""
    plain: Fraction = 0.5
    """Share of rollouts that make one chunk after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.grids) != 1 or not self.stream.rolling:
            raise ValueError(
                f"a rolling window has one list of times and at least one chunk, got {len(self.grids)} lists and "
                f"stream.rolling={self.stream.rolling}; set both, for example 4 times and rolling: 4"
            )
        Rolling(chunks=self._chunks(None))  # ValueError for steps or a memory that it cannot have

    @property
    def calls(self) -> float:
        """Per frame: a call on a window counts as one for each of its frames."""
        return self.plain * self._serial.calls + (1 - self.plain) * (len(self.grids[0]) + self.stream.commits)

    @property
    def fullest(self) -> Mapping[str, int]:
        """One chunk after the other, where that may be: then most calls with gradient keep what they read of the past."""
        return {"coin": 0, "residue": 0, **self._serial.fullest}

    def __call__(self, student: Predictor, batch: Batch, rng: Rng, *, grad: bool) -> Rolled:
        if rng.integer("coin", _COIN) < self.plain * _COIN:
            return self._serial(student, batch, rng, grad=grad)
        rolling, lengths = Rolling(chunks=self._chunks(student)), self.stream.lengths(batch.latent_shape[1])
        steps = len(self.grids[0])
        noises = [start_noise(self.stream, index, batch.frame_shape, rng) for index in range(len(lengths))]
        chosen, memory, window = rng.integer("residue", steps), rolling.chunks.begin(), tuple[Flying, ...]()
        made, tiled = [list[Visit]() for _ in lengths], set[int]()

        def start(index: int) -> Tensor | None:
            return student.path.prior(noises[index]) if index < len(lengths) else None

        for call in range(steps + (len(lengths) - 1) * rolling.turns):
            window = rolling.pushed(memory, window, start)
            trained = call % steps == chosen
            with torch.set_grad_enabled(grad and trained):
                after = rolling.tick(memory, window, batch.cond, batch.cond, rng)
                for flying, prediction in zip(window, after.predictions, strict=True):
                    if flying.index not in tiled:
                        made[flying.index].append(Visit(prediction.x0, prediction.x_t, prediction.t))
                tiled |= {flying.index for flying in window if trained}
            with torch.no_grad():
                memory, window = after.memory or memory, after.window
        (*before, last) = aligned(made, apart=True)
        return Rolled(last.x0, last.x_t, last.t, tuple(before), torch.cat(noises, 2), exit=len(before))

    @property
    def _serial(self) -> SelfForced:
        """One chunk after the other."""
        stream = replace(self.stream, rolling=0)
        return SelfForced(grids=self.grids, shift=self.shift, mode=self.mode, stream=stream)

    def _chunks(self, student: Predictor | None) -> Chunks:
        (grid,) = exact(self.grids, self.shift)
        return Chunks(network=student, contract=self.contract(Contract()), times=(*grid, 0.0))  # type: ignore[arg-type]

    def contract(self, teacher: Contract) -> Contract:
        """It streams, with a rolling window."""
        return replace(super().contract(teacher), stream=self.stream)
