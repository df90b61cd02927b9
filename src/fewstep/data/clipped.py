"""Captions with clips: what a causal teacher reads as the past of each chunk, while its trajectories are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from torch import Tensor

from fewstep.data.base import DataError
from fewstep.data.shards import Latents
from fewstep.data.store import ShardReader
from fewstep.diffusion import Stream
from fewstep.models.bundle import VideoModel
from fewstep.models.by_chunk import chunks_of
from fewstep.models.card import Card


@dataclass(frozen=True)
class Clipped(Sequence[str]):
    """Captions, each with the clip that it describes."""

    captions: Sequence[str]
    latents: Callable[[Sequence[int]], Tensor]
    """Clean latents of the clips of these rows, `[B, C, F, H, W]`, in main memory. A clip does not depend on its batch."""
    origin: str
    """What made the clips, in words or as a digest: two origins are two sets of clips."""

    def __len__(self) -> int:
        return len(self.captions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self.captions[index]


def prepared_clips(folder: str | Path, model: VideoModel) -> Clipped:
    """The clips of a folder by `fewstep prepare`. DataError if they are not of this model's size and autoencoder."""
    data = Latents(path=str(folder))
    data.check_card(model.card)
    data.check(model)
    reader = ShardReader(folder, "latents")
    captions = tuple(reader.captions)
    return Clipped(captions, lambda rows: reader.read("latents", rows), reader.manifest["settings_hash"])


def past_of(card: Card, prompts: Sequence[str]) -> Stream | None:
    """How a teacher that streams reads clips of the past; None for one that makes whole clips.

    DataError if prompts lack clips that the teacher must read, or have some that it cannot, and for streams of which one call
    cannot solve all chunks.
    """
    stream, clipped = card.contract.stream, isinstance(prompts, Clipped)
    if stream is None and clipped:
        raise DataError(
            f"these prompts have clips, and {card.name!r} makes whole clips and reads none; give prompts alone"
        )
    if stream is None:
        return None
    if not clipped:
        raise DataError(
            f"these prompts have no clips, and {card.name!r} streams: its trajectories need clips that each chunk reads as its "
            "past; give a folder by `fewstep prepare`, or world:N"
        )
    if stream.commit != "clean" or stream.rolling > 1 or stream.steps:
        raise DataError(
            f"trajectories after clean chunks are those of a stream that remembers clean chunks and makes one after the other, "
            f"in one number of steps; {card.name!r} has commit={stream.commit!r}, rolling={stream.rolling} and "
            f"steps={list(stream.steps)}. Take a model trained with history TeacherForced"
        )
    chunks_of(stream, sum(stream.chunks))
    return stream
