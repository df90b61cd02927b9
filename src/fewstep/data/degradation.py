"""Low-resolution clips from sharp ones, for students that make clips sharp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from fewstep.core import Rng
from fewstep.core.bounds import Amount, Count, require_bounds
from fewstep.core.pixels import to_uint8


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How a sharp clip becomes one of a low resolution: blurred, reduced, with noise, and stored in 8 bits.

    Every clip has its own strength of blur and noise, from 0 to the given one, the same in all its frames. Public restorers are
    trained on two such rounds with compression between them (Real-ESRGAN, 2107.10833); this is one round, without compression.
    """

    factor: Count = 4
    """Factor between the two heights, and widths: means of so many pixels each way are one pixel."""
    blur: Amount = 0.0
    """Largest standard deviation of the Gaussian blur before, in pixels of the sharp clip."""
    noise: Amount = 0.0
    """Largest standard deviation of the noise, on pixels in [-1, 1]."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def __call__(self, frames: Tensor, rng: Rng) -> Tensor:
        """Clips `[B, 3, F, H, W]` in [-1, 1] to `[B, 3, F, H / factor, W / factor]`, a function of `rng`. ValueError for a size
        that `factor` does not divide."""
        clips, _, _, height, width = frames.shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"clips of {height} x {width} cannot be reduced by {self.factor}; let low.factor be a divisor of both"
            )
        planes = frames.transpose(1, 2)
        if self.blur > 0:
            widths = (self.blur * rng.rand((clips,), "blur")).tolist()
            planes = torch.stack([blurred(clip, width, self.blur) for clip, width in zip(planes, widths, strict=True)])
        low = avg_pool2d(planes.flatten(0, 1), self.factor).unflatten(0, (clips, -1)).transpose(1, 2)
        if self.noise > 0:
            level = self.noise * rng.rand((clips,), "level").to(low.dtype).reshape(-1, 1, 1, 1, 1)
            low = low + level * rng.randn(low.shape, "noise").to(low.dtype)
        return to_uint8(low).to(frames.dtype) / 127.5 - 1


def blurred(planes: Tensor, width: float, largest: float) -> Tensor:
    """Images `[N, C, H, W]` under a Gaussian of standard deviation `width`, in a window for the `largest`; edges are repeated."""
    reach = math.ceil(3 * largest)
    place = torch.arange(-reach, reach + 1, dtype=planes.dtype, device=planes.device)
    weights = torch.exp(-0.5 * (place / max(width, 1e-6)) ** 2)
    row = (weights / weights.sum()).expand(planes.shape[1], 1, 1, -1)
    planes = pad(planes, (reach,) * 4, mode="replicate")
    for kernel in (row, row.transpose(2, 3)):
        planes = conv2d(planes, kernel, groups=planes.shape[1])
    return planes
