"""Which part of a stream that is longer than a clip is trained on (Self-Forcing++, 2510.02283)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from fewstep.core import Rng
from fewstep.diffusion import Stream


@dataclass(frozen=True)
class Stretch:
    """A part of a stream, as long as one clip."""

    begin: int
    """First chunk that is seen."""
    first: int
    """First chunk that is trained on."""
    lengths: tuple[int, ...]
    """Latent frames of all chunks from the beginning of the stream up to the last one of the stretch."""

    @classmethod
    def drawn(cls, stream: Stream, frames: int, clips: int, overlap: int, rng: Rng) -> Stretch:
        """A random stretch of so many latent frames in a stream of up to `clips` times as many. Its first `overlap` frames are
        not trained on, unless it begins the stream. ValueError for an overlap that is not whole chunks."""
        if clips == 1:
            return cls(0, 0, stream.lengths(frames))
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
