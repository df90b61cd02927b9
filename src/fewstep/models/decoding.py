"""Decode latents chunk by chunk during sampling; the memory is an argument.

Every codec has `decode_next(latents, past, last=...) -> Decoded`. Joined, the frames are those of `decode`; what a codec
must wait for, and where it is not exactly the whole, is said where its class is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fewstep.models.encoding import Encoded


@dataclass(frozen=True)
class Decoded:
    """What one chunk gave."""

    frames: Tensor
    """Frames `[B, 3, K, H, W]`. K is 0 while the decoder waits for more latents."""
    past: Any
    """Memory for the next chunk. It is never changed in place, so a stream may continue from it more than once."""


class ChunkCodec(Protocol):
    """A codec that decodes chunk by chunk."""

    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Decoded:
        """Frames of latents `[B, C, f, h, w]` that follow those of `past`; None: the clip begins here.

        With `last` nothing follows, and the frames that were held back come too; f may be 0.
        """

    def clip_frames(self, latents: int) -> int:
        """Frames of a clip of so many latent frames, 1 at least."""

    @property
    def whole_in_chunks(self) -> bool:
        """Whether chunks give exactly the frames that the whole clip gives."""


class FrameByFrame(ABC):
    """For codecs that know no time: every latent frame is decoded by itself."""

    downsample: int
    whole_in_chunks: ClassVar[bool] = True
    """Whether chunks give exactly the frames that the whole clip gives."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The frames."""

    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Decoded:
        """As in `ChunkCodec`; every frame comes at once, and nothing is remembered."""
        if latents.shape[2]:
            return Decoded(self.decode(latents), past)
        batch, _, _, height, width = latents.shape
        return Decoded(latents.new_zeros(batch, 3, 0, height * self.downsample, width * self.downsample), past)

    @abstractmethod
    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        """The latents."""

    def encode_next(self, frames: Tensor, past: Any = None) -> Encoded:
        """As in `ChunkEncoder`; every latent comes at once, and nothing is remembered."""
        return Encoded(self.encode(frames), past)

    def clip_frames(self, latents: int) -> int:
        """As many."""
        return latents


@torch.no_grad()  # else a clip's graph would grow with it
def decode_stream(codec: ChunkCodec, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames `[B, 3, K, H, W]`, K > 0, as soon as the latents `[B, C, f, h, w]` that they need are there. No gradient."""
    past, nothing = None, None
    for latents in chunks:
        made = codec.decode_next(latents, past)
        past, nothing = made.past, latents[:, :, :0]
        if made.frames.shape[2]:
            yield made.frames
    if nothing is not None:
        rest = codec.decode_next(nothing, past, last=True).frames
        if rest.shape[2]:
            yield rest
