"""What a chunk reads of earlier chunks in training on stored clips, where all chunks are predicted in parallel.

A network reads whole clips in one call, or it will stream and each chunk may read earlier chunks only. Then there are two ways
to train all chunks at once: what is read has noise of its own (diffusion forcing), or none (teacher forcing). The third way,
reading what the student itself has made, needs no stored clips and is a rollout (`SelfForced`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.diffusion import Contract, TimeDensity
from fewstep.models.denoiser import Predictor


class History(ABC):
    """What the student's inputs are, chunk by chunk: their times, and what they read of each other. A frozen dataclass."""

    stream: Any = None
    """How the student will make clips chunk by chunk (`Stream`); None: it makes whole clips."""
    calls: ClassVar[int] = 1
    """Calls of the network for one prediction."""

    @abstractmethod
    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        """`network` as it reads the clips `x0` `[B, C, F, H, W]`: a call with `n B` samples reads them n times."""

    def times(self, density: TimeDensity, clips: Tensor, rng: Rng) -> Tensor:
        """Times of clips like `[B, C, F, H, W]`: one for each, `[B]`, or one for each chunk, on all its frames, `[B, F]`."""
        return self._on_frames(density.sample(len(clips), rng, frames=self._chunks(clips)), clips, rng, clean=0.0)

    def index(self, count: int, clips: Tensor, rng: Rng) -> Tensor:
        """Likewise a number below `count` that stands for a time; `count` itself for a chunk without noise."""
        chunks = self._chunks(clips)
        shape = (len(clips),) if chunks is None else (len(clips), chunks)
        return self._on_frames(rng.integers(shape, "index", count), clips, rng, clean=count)

    def _chunks(self, clips: Tensor) -> int | None:
        return None if self.stream is None else len(self.stream.lengths(clips.shape[2]))

    def _on_frames(self, drawn: Tensor, clips: Tensor, rng: Rng, clean: float) -> Tensor:
        if self.stream is None:
            return drawn
        lengths = torch.tensor(self.stream.lengths(clips.shape[2]), device=drawn.device)
        return self._mixed(drawn, rng, clean).repeat_interleave(lengths, 1)

    def _mixed(self, drawn: Tensor, rng: Rng, clean: float) -> Tensor:
        """What was drawn for chunks `[B, n]`, where some of them shall have no noise."""
        return drawn

    def contract(self, contract: Contract) -> Contract:
        """The same contract for a student that streams, if it does."""
        return contract if self.stream is None else replace(contract, stream=self.stream)


@dataclass(frozen=True, kw_only=True)
class WholeClip(History):
    """Every frame reads every other, and all have one time."""

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return network
