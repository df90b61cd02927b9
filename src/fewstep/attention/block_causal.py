"""Frames in chunks: everything inside a chunk, nothing of the future."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.attention.pattern import Grid3, Pattern
from fewstep.core.bounds import Count


@dataclass(frozen=True)
class BlockCausal(Pattern):
    """Bidirectional inside a chunk of `chunk` frames, causal between chunks (CausVid, 2412.07772).

    A cache must end where a chunk ends, so that streaming chunk by chunk equals one masked forward.
    """

    chunk: Count = 1
    """Latent frames per chunk; the last chunk of a clip may be shorter."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"BlockCausal needs chunk >= 1 frame, got {self.chunk}")

    def mask(self, grid: Grid3, cached: int = 0) -> Tensor | None:
        if cached % self.chunk:
            raise ValueError(
                f"a cache of {cached} frames ends inside a chunk of {self.chunk}; commit whole chunks only"
            )
        if grid.frames <= self.chunk:
            return None  # one chunk: the past and itself, that is everything
        chunk_of_key = torch.arange(cached + grid.frames) // self.chunk
        chunk_of_query = chunk_of_key[cached:]
        may_look = chunk_of_query[:, None] >= chunk_of_key[None, :]
        return may_look.repeat_interleave(grid.per_frame, 0).repeat_interleave(grid.per_frame, 1)
