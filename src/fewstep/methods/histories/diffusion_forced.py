"""Diffusion forcing: each chunk has its own noise level, and reads earlier chunks at theirs (2407.01392; CausVid, 2412.07772)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.core.bounds import Fraction
from fewstep.diffusion import Stream
from fewstep.methods.histories.base import History
from fewstep.models.by_chunk import ByChunk
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class DiffusionForced(History):
    """Chunks read noised chunks: one call per prediction. At sampling time they read clean ones, which training seldom shows."""

    stream: Stream = Stream()
    """How clips are made chunk by chunk."""
    clean: Fraction = 0.0
    """Share of chunks without noise, which teach nothing themselves (CausVid: one of the T + 1 levels)."""

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return ByChunk(network, self.stream)

    def _mixed(self, drawn: Tensor, rng: Rng, clean: float) -> Tensor:
        without = rng.rand(tuple(drawn.shape), "clean") < self.clean
        return torch.where(without, torch.full_like(drawn, clean), drawn)
