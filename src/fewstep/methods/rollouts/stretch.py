"""Which part of a stream that is longer than a clip is trained on (Self-Forcing++, 2510.02283)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from fewstep.core import Rng
from fewstep.diffusion import Stream


@dataclass(frozen=True)
class Stretch:
    """A part of a stream, as long as one clip.

    Not as published: the papers replace the first latent of a later stretch by an image latent (decode, and encode the last frame
    before it alone). A rollout has no autoencoder, so latents stay.
    """

    begin: int
    """First chunk that is seen."""
    first: int
    """First chunk that is trained on."""
    lengths: tuple[int, ...]
    """Latent frames of all chunks from the beginning of the stream up to the last one of the stretch."""

    @classmethod
    def drawn(cls, stream: Stream, frames: int, clips: int, overlap: int, given: int, rng: Rng) -> Stretch:
        """A random stretch of so many latent frames in a stream of up to `clips` times as many. Its first `overlap` frames are
        not trained on, unless it begins the stream. A single clip begins with so many `given` chunks, which are not trained on
        either. ValueError for an overlap that is not whole chunks, and where nothing is left to train on."""
        if clips == 1:
            if given >= len(lengths := stream.lengths(frames)):
                raise ValueError(f"a clip has {len(lengths)} chunks, and given={given} leaves none to train; lower it")
            return cls(0, given, lengths)
        lengths = stream.lengths(clips * frames)
        bounds = [0, *accumulate(lengths)]
        starts = [i for i, low in enumerate(bounds) if low + frames in bounds]
        begin = starts[rng.integer("stretch", len(starts))]
        trained = bounds[begin] + (overlap if begin else 0)
        if trained not in bounds or trained >= bounds[begin] + frames:
            raise ValueError(
                f"an overlap of {overlap} frames is not whole chunks of {list(stream.chunks)} in a clip of {frames}; give a sum "
                "of its first chunks that leaves some"
            )
        return cls(begin, bounds.index(trained), lengths[: bounds.index(bounds[begin] + frames)])


def require_stretch(stream: Stream, clips: int, overlap: int, given: int, context: bool) -> None:
    """ValueError for fields of a rollout that contradict each other."""
    if overlap and clips == 1:
        raise ValueError("overlap begins a later stretch; let a rollout have more clips, or write overlap: 0")
    if overlap % stream.chunks[-1]:
        raise ValueError(
            f"an overlap of {overlap} frames is not whole chunks of {list(stream.chunks)}; the later ones have "
            f"{stream.chunks[-1]}, so write a multiple of that"
        )
    if given and clips > 1:
        raise ValueError("a rollout of several clips cannot begin with data; write clips: 1, or given: 0")
    if context and clips == 1:
        raise ValueError("context comes before a later stretch; let a rollout have more clips, or write context: false")
