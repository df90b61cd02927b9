"""Teacher forcing: each chunk has its own noise level, and reads earlier chunks of the clip without noise.

As in the first stage of Causal Forcing (2602.02214): clean and noised clip have equal positions, a noised chunk reads the clean
chunks before it and itself, a clean chunk the clean ones up to itself. There is no doubled sequence and no mask: the clean
clip is a call of its own, whose keys and values the noised one reads; gradient flows through both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.diffusion import Stream
from fewstep.methods.histories.base import History
from fewstep.models.by_chunk import ByChunk
from fewstep.models.denoiser import Predictor


@dataclass(frozen=True, kw_only=True)
class TeacherForced(History):
    """Chunks read clean chunks, as at sampling time, but those of data: two calls per prediction."""

    calls: ClassVar[int] = 2
    stream: Stream = Stream()
    """How clips are made chunk by chunk."""

    def __post_init__(self) -> None:
        if self.stream.commit != "clean":
            raise ValueError(
                f"teacher forcing reads clean chunks, and this stream remembers {self.stream.commit!r} ones; set its commit "
                "to clean"
            )

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return ByChunk(network, self.stream, x0)
