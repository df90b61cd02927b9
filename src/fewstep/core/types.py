"""What travels between rooms: conditions, batches, named losses.

Shapes: latents are `[B, C, F, H, W]`, text states `[B, L, D]`, time `t` is `[B]` or `[B, F]` with 0 = data, 1 = noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Losses = Mapping[str, Tensor]
"""Named scalar terms of one graph. The engine adds them up and runs backward once."""

KV = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each `[B, H, N, D]`, keys without rotary position."""


@dataclass(frozen=True)
class Cond:
    """Text condition: states `[B, L, D]` and a mask `[B, L]` that is True on real tokens."""

    text: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Tensor | slice) -> Cond:
        return Cond(self.text[index], self.mask[index])

    def to(self, device: str | torch.device) -> Cond:
        return Cond(self.text.to(device), self.mask.to(device))

    def expand(self, batch: int) -> Cond:
        """The single condition of this object, repeated `batch` times."""
        return Cond(self.text.expand(batch, -1, -1), self.mask.expand(batch, -1))

    def where(self, keep: Tensor, other: Cond) -> Cond:
        """This condition where `keep` `[B]` is True, `other` elsewhere (condition dropout)."""
        return Cond(
            torch.where(keep[:, None, None], self.text, other.text),
            torch.where(keep[:, None], self.mask, other.mask),
        )

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        return Cond(torch.cat([p.text for p in parts]), torch.cat([p.mask for p in parts]))


@dataclass(frozen=True)
class Pairs:
    """Stored ODE states of a teacher: `states[:, i]` is `x_t` at `times[i]`; the last is the endpoint at time 0."""

    states: Tensor
    """`[B, T+1, C, F, H, W]`."""
    times: tuple[float, ...]
    """Decreasing, `times[0] == 1` and `times[-1] == 0`."""


@dataclass(frozen=True)
class Batch:
    """One batch. Fields a data source does not provide are None; `Method.needs` names those a method reads."""

    cond: Cond
    uncond: Cond
    """The null (or negative) prompt, already expanded to the batch."""
    latent_shape: tuple[int, int, int, int]
    """`(C, F, H, W)` of the clips to make."""
    prompts: tuple[str, ...] = ()
    x0: Tensor | None = None
    """Clean latents `[B, C, F, H, W]`."""
    pairs: Pairs | None = None
    frames: Tensor | None = None
    """Pixels `[B, 3, F, H, W]` in [-1, 1]."""
    labels: Tensor | None = None
    """Attribute indices `[B, A]`, for the small encoders of the built-in world."""

    def __len__(self) -> int:
        return len(self.cond)

    def require(self, field: str) -> Any:
        """A field that may be missing; ValueError naming it where it is."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"this batch has no {field}; use data that provide it (Method.needs must name it)")
        return value

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (len(self), *self.latent_shape)
