"""The noise that a chunk of a stream starts from: in training and serving, one chunk after the other and several at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core import Rng, Seeds
from fewstep.diffusion import Stream


def start_noise(stream: Stream, index: int, size: tuple[int, int, int, int], rng: Seeds | Rng) -> Tensor:
    """Noise of chunk `index`, `[B, C, f, H, W]`, before its path scales it. `size` is `(B, C, H, W)`, and `rng` the stream's.

    It is the chunk's own, `rng.fold("chunk/n")`, or with `Stream.noise` that of earlier frames, in another order.
    """
    if stream.noise is None:
        return _own(stream, index, size, rng)
    begin = stream.begin(index)
    frames = [stream.noise.source(frame) for frame in range(begin, begin + stream.length(index))]
    drawn, first, chunk = dict[int, Tensor](), 0, 0
    while first <= max(frames):
        after = first + stream.length(chunk)
        if any(first <= frame < after for frame in frames):
            noise = _own(stream, chunk, size, rng)
            drawn |= {first + place: noise[:, :, place] for place in range(after - first)}
        first, chunk = after, chunk + 1
    return torch.stack([drawn[frame] for frame in frames], 2)


def _own(stream: Stream, index: int, size: tuple[int, int, int, int], rng: Seeds | Rng) -> Tensor:
    return rng.fold(f"chunk/{index}").randn((*size[:2], stream.length(index), *size[2:]), "start")
