"""Rotary position embedding (2104.09864) over frames, rows and columns.

Legend: B batch, F frames, H heads, M tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.attention import Grid3


class Rotary(Protocol):
    """Tables of angles, and how they turn keys and queries."""

    @property
    def longest(self) -> int | None:
        """Number of frames whose positions the network knows; None: any."""
        ...

    def table(self, frames: Tensor, grid: Grid3, like: Tensor) -> Tensor:
        """Cosines and sines of the tokens of frames that stand at `frames`, `[F]`: `[2, M, D / 2]` or `[2, H, M, D / 2]`, with
        the type and on the device of `like`.

        Streams that differ in age have `frames` `[B, F]` and get `[2, B, 1 or H, M, D / 2]`.
        """
        ...

    def turn(self, x_BHMD: Tensor, table: Tensor) -> Tensor:
        """Every token turned by its angles, in the dtype of `x`."""
        ...


@dataclass(frozen=True)
class FrameRotary:
    """Part of the angles turn with the frame, part with row and column, in the split that Wan made common."""

    dim: int
    base: float
    halves: bool = False
    """Whether the pairs `(x[i], x[i + D/2])` are rotated, or the pairs `(x[2i], x[2i + 1])`."""
    longest: int | None = None

    def table(self, frames: Tensor, grid: Grid3, like: Tensor) -> Tensor:
        """An axis has its own angles, so only each axis is computed in float64 on the CPU, which takes no time."""
        if frames.ndim == 2:
            return torch.stack([self.table(row, grid, like) for row in frames], 1)[:, :, None]
        pairs = self.dim // 2
        sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        axes = frames, torch.arange(grid.height), torch.arange(grid.width)
        tables = []
        for axis, (positions, size) in enumerate(zip(axes, sizes, strict=True)):
            angle = positions[:, None] * self.base ** (-torch.arange(size, dtype=torch.float64) / size)
            shape = [2, 1, 1, 1, size]
            shape[1 + axis] = len(positions)
            table = torch.stack([angle.cos(), angle.sin()]).to(like).view(shape)
            tables.append(table.expand(2, len(frames), grid.height, grid.width, size))
        return torch.cat(tables, -1).flatten(1, 3)

    def turn(self, x_BHMD: Tensor, table: Tensor) -> Tensor:
        return turn_halves(x_BHMD, table) if self.halves else turn_pairs(x_BHMD, table)


def turn_halves(x_BHMD: Tensor, table: Tensor) -> Tensor:
    """Turn each pair `(x[i], x[i + D/2])`."""
    cos, sin = table
    a, b = x_BHMD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def turn_pairs(x_BHMD: Tensor, table: Tensor) -> Tensor:
    """Turn each pair `(x[2i], x[2i + 1])`: as complex numbers in one pass, which the compiler does not know."""
    cos, sin = table
    if not torch.compiler.is_compiling():
        kind = torch.promote_types(torch.promote_types(x_BHMD.dtype, cos.dtype), torch.float32)
        wide = x_BHMD.to(kind).unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(wide) * torch.complex(cos.to(kind), sin.to(kind))
        return torch.view_as_real(turned).flatten(-2).to(x_BHMD.dtype)
    a, b = x_BHMD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x_BHMD.dtype)
