"""FreeNoise (2310.15169): frames of a long stream start from the noise of earlier frames, in another order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core import Rng
from fewstep.core.bounds import Size, require_bounds


@dataclass(frozen=True, kw_only=True)
class FreeNoise:
    """The first `window` frames have noise of their own; each later block of `stride` frames has that of the block one window
    before, permuted. So any `window` frames from the beginning of a block on have each of the first noises once, and each frame
    by itself starts from N(0, 1). ValueError for a window that is not whole blocks.

    Not here: the paper's attention in overlapping windows, and its prompts at chosen steps and layers. A stream may show repeated
    noise as a loop.
    """

    window: Size = 16
    """Latent frames with noise of their own (the paper's window of its teacher, in latent frames)."""
    stride: Size = 4
    """Latent frames of a block, within which the order changes."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.window % self.stride:
            raise ValueError(f"a window of {self.window} frames is not whole blocks of {self.stride}; take a multiple")

    def source(self, frame: int) -> int:
        """The frame, one of the first `window`, whose noise `frame` has. The same in every stream.

        >>> sorted(FreeNoise(window=4, stride=2).source(frame) for frame in range(4, 8))
        [0, 1, 2, 3]
        """
        while frame >= self.window:
            place = frame % self.stride
            order = torch.randperm(self.stride, generator=Rng(frame - place).shared("FreeNoise"))
            frame += int(order[place]) - place - self.window
        return frame
