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
from fewstep.models.one_by_one import OneByOne


@dataclass(frozen=True, kw_only=True)
class TeacherForced(History):
    """Chunks read clean chunks, as at sampling time, but those of data: two calls per prediction."""

    calls: ClassVar[int] = 2
    stream: Stream = Stream()
    """How clips are made chunk by chunk."""
    apart: bool = False
    """Whether each chunk is calls of its own, one to predict and one to remember: for memories that one call on all chunks
    cannot have, such as `Facing` or `CompressedMemory`. As many operations, and slower."""

    def __post_init__(self) -> None:
        if self.apart and (self.stream.recompute or self.stream.rolling > 1):
            raise ValueError(
                "chunks that are calls of their own carry their memory on; leave recompute and rolling out"
            )
        if self.stream.commit != "clean":
            raise ValueError(
                f"teacher forcing reads clean chunks, and this stream remembers {self.stream.commit!r} ones; set its commit "
                "to clean"
            )

    def over(self, network: Predictor, x0: Tensor) -> Predictor:
        return (OneByOne if self.apart else ByChunk)(network, self.stream, x0)
