"""A moving buffer (StreamDiT, 2507.03745): one call denoises a whole clip, whose later frames have more noise than earlier ones.

At sampling time a window of N chunks rolls on (`streaming.rolling`): it makes T / N steps, in each of which every chunk goes down
by 1 / T, then the oldest is clean and leaves, and noise enters. Here a clip is that window at a random moment. Nothing is
remembered of what has left it. Not from the paper: clean reference frames before the window (K, here 0) and windowed attention
are left out; the paper's numbers of the mixture are not published; at the beginning and at the end of a stream the window is
shorter than in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.core.bounds import Size
from fewstep.diffusion import Contract, Stream, TimeDensity
from fewstep.methods.histories.base import History
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class MovingBuffer(History):
    """Frames read each other in both directions; the clip is in equal parts, each with more noise than the one before."""

    stream: Stream = Stream(chunks=(2,), rolling=8, commit="nothing")
    """How clips are made: `rolling` chunks are as long as the clips of the training."""
    parts: tuple[Size, ...] = (1, 4, 8)
    """Numbers of parts; each clip draws one. 1: all frames have one time (the paper's uniform scheme, ordinary flow matching).
    As many as frames: each has its own (diagonal). It holds `stream.rolling`."""

    def __post_init__(self) -> None:
        stream = self.stream
        if len(stream.chunks) != 1 or stream.commit != "nothing" or stream.rolling not in self.parts:
            raise ValueError(
                f"a moving buffer has chunks of one length, remembers nothing, and is trained in as many parts as it has chunks; "
                f"got chunks={stream.chunks}, commit={stream.commit!r}, rolling={stream.rolling} and parts={self.parts}"
            )

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return network

    def times(self, density: TimeDensity, clips: Tensor, rng: Rng) -> Tensor:
        """Of part j of n: quantile `(j + u) / n` of the density, with one u for the clip. So a part has the times of its n-th of
        the density, and all frames together have the density itself."""
        parts, part = self._parts(clips, rng)
        t = _ByPart(density, parts, part).sample(len(clips), rng)
        return t[:, 0] if max(self.parts) == 1 else t

    def index(self, count: int, clips: Tensor, rng: Rng) -> Tensor:
        """The step that each part is at, of `count`: all have made as many of the `count / n` steps that are theirs."""
        if any(count % n for n in self.parts):
            raise ValueError(f"{count} times cannot be shared by {self.parts} parts; give a multiple of each")
        parts, part = self._parts(clips, rng)
        step = (parts - 1 - part) * (count // parts) + rng.integers((len(clips),), "index", count)[:, None] % (
            count // parts
        )
        return step[:, 0] if max(self.parts) == 1 else step

    def _parts(self, clips: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Number of parts of each clip `[B, 1]`, and the part of each frame `[B, F]`."""
        frames, window = clips.shape[2], self.stream.rolling * self.stream.chunks[0]
        if frames != window or any(frames % n for n in self.parts):
            raise ValueError(
                f"clips have {frames} latent frames, and the buffer {window}, in {', '.join(map(str, self.parts))} equal parts; "
                "give clips of that length, and parts that divide it"
            )
        drawn = rng.integers((len(clips), 1), "parts", len(self.parts))
        parts = torch.tensor(self.parts, device=drawn.device)[drawn]
        return parts, torch.arange(frames, device=drawn.device) * parts // frames

    def contract(self, contract: Contract) -> Contract:
        """It rolls; the number of steps is rounded up to one that its chunks can share, where any number may be taken."""
        steps = -(-contract.steps // self.stream.rolling) * self.stream.rolling
        if contract.grid.counts and steps != contract.steps:
            raise ValueError(
                f"{contract.steps} steps cannot be shared by {self.stream.rolling} chunks; take a multiple"
            )
        return replace(contract, stream=self.stream, steps=steps)


@dataclass(frozen=True, eq=False)
class _ByPart(TimeDensity):
    """A density, of which each part of a clip has its share. A sample is `[B, F]`."""

    whole: TimeDensity
    parts: Tensor
    part: Tensor

    def at_quantile(self, u: Tensor) -> Tensor:
        return self.whole.at_quantile((self.part + u[:, None]) / self.parts)
