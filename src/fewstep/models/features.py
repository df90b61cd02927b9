"""The feature network of the built-in world: one vector for a clip's look and motion.

Space is a torus (circular padding), time is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.bounds import Size


class ClipFeatures(nn.Module):
    """A small 3-D network on clips `[B, 3, F, H, W]` in [-1, 1], any number of frames; H and W multiples of 8."""

    def __init__(self, *, width: Size = 32, attribute_sizes: Sequence[Size] = ()) -> None:
        super().__init__()
        self.args = {"width": width, "attribute_sizes": list(attribute_sizes)}
        self.width = 4 * width
        """Length of a feature vector."""
        self.stem = _Conv(3, width, stride=(1, 2, 2))
        self.blocks = nn.Sequential(_Residual(width, 2 * width), _Residual(2 * width, 4 * width))
        self.norm = nn.GroupNorm(8, 4 * width)
        self.attributes = nn.ModuleList(nn.Linear(4 * width, size) for size in attribute_sizes)

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, 4 * width]`."""
        volume = F.silu(self.norm(self.blocks(self.stem(frames))))
        return volume.to(frames.dtype).mean((2, 3, 4))

    def classify(self, frames: Tensor) -> list[Tensor]:
        """Logits per attribute of the clip (training only)."""
        features = self(frames)
        return [attribute(features).to(features.dtype) for attribute in self.attributes]


class _Conv(nn.Module):
    """3 x 3 x 3 convolution, circular in space, zeros before the first and after the last frame."""

    def __init__(self, channels: int, out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, 3, stride=stride, padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="circular"))


class _Residual(nn.Module):
    """Halves time, height and width."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm_first, self.norm_second = nn.GroupNorm(8, channels), nn.GroupNorm(8, out)
        self.first = _Conv(channels, out, stride=(2, 2, 2))
        self.second = _Conv(out, out)
        self.skip = nn.Conv3d(channels, out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(self.norm_first(x)))
        return self.skip(x) + self.second(F.silu(self.norm_second(y)))
