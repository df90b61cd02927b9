"""Encode frames chunk by chunk, as they come; the memory is an argument.

Codecs whose encoder looks back only have `encode_next(frames, past) -> Encoded`. Joined, the latents are those of `encode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """What one chunk of frames gave."""

    latents: Tensor
    """`[B, C, f, h, w]`. f is 0 while the encoder waits for more frames."""
    past: Any
    """Memory for the next chunk. It is never changed in place, so a stream may continue from it more than once."""


class ChunkEncoder(Protocol):
    """A codec that encodes chunk by chunk."""

    def encode_next(self, frames: Tensor, past: Any = None) -> Encoded:
        """Latents of frames `[B, 3, F, H, W]` in [-1, 1] that follow those of `past`; None: the clip begins here. ValueError for
        a codec that cannot."""


@torch.no_grad()
def encode_stream(codec: ChunkEncoder, chunks: Iterable[Tensor], lengths: Iterable[int]) -> Iterator[Tensor]:
    """Latents in chunks of `lengths`, each as soon as the frames `[B, 3, F, H, W]` that it needs are there. No gradient.

    `chunks` may have any numbers of frames. Latents after the last whole chunk are left out.
    """
    frames, past, waiting = iter(chunks), None, list[Tensor]()
    for length in lengths:
        while sum(latents.shape[2] for latents in waiting) < length:
            some = next(frames, None)
            if some is None:
                return
            made = codec.encode_next(some, past)
            past = made.past
            waiting.append(made.latents)
        joined = torch.cat(waiting, 2)
        waiting = [joined[:, :, length:]]
        yield joined[:, :, :length]
