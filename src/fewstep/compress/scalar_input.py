"""One more scalar input of a network, such as guidance strength, or the second time of a flow map or shortcut model.

It is embedded as the time is and added to the embedding of the time. The new layer begins at zero and reads fixed waves, so a
network that was just changed computes what it computed before, and needs no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compress.transform import Transform

_WAVES = 128
_FASTEST = 100.0
"""Radians per unit of the fastest wave, as for time."""


@dataclass(frozen=True, kw_only=True)
class ScalarInput(Transform):
    """The network reads `Cond.extra[name]`, `[B]`: a second time, or the guidance strength that it shall imitate."""

    name: str
    scale: float = 1.0
    """Divisor of the number, so that the result is about 0 to 1: about 10 for a guidance strength."""
    default: float | None = None
    """Value to use if a condition does not contain the number. null: a condition must contain it."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be a word such as 'guidance', got {self.name!r}")
        if hasattr(nn.ModuleDict(), self.name):  # where the network keeps it
            raise ValueError(
                f"name: {self.name!r} is a word of torch's own, such as keys, values, type or training; choose another one, or "
                "FrameInput for numbers of every frame"
            )
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    @property
    def identity(self) -> bool:
        return True

    def apply(self, network: Any) -> Any:
        if not network.takes_scalars:
            raise ValueError(
                f"a {type(network).__name__} takes no scalar inputs: it does not add them to its time embedding"
            )
        if self.name in network.scalars or self.name in {signal.told.name for signal in network.signals}:
            raise ValueError(f"this network reads a scalar {self.name!r} already")
        weight = next(network.parameters())
        network.scalars[self.name] = Scalar(self, network.width, device=weight.device, dtype=weight.dtype)
        return network


class Scalar(nn.Module):
    """The embedding of one scalar, zero at first."""

    def __init__(self, told: ScalarInput, width: int, **place: Any) -> None:
        super().__init__()
        self.told = told
        self.out = nn.utils.skip_init(nn.Linear, _WAVES, width, **place)
        if not self.out.weight.is_meta:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, time_BGE: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The time embedding with this added. ValueError where a condition does not say what is needed."""
        told, batch = self.told, len(time_BGE)
        value_B = extra.get(told.name)
        if value_B is None and told.default is not None:
            value_B = time_BGE.new_full((batch,), told.default)
        if value_B is None:
            raise ValueError(
                f"this network reads the scalar {told.name!r} of every sample, and the condition has none; put a tensor [B] into "
                f"Cond.extra[{told.name!r}], or give ScalarInput a default"
            )
        if value_B.shape != (batch,):
            raise ValueError(f"Cond.extra[{told.name!r}] must be [{batch}], got {tuple(value_B.shape)}")
        return time_BGE + self.out(waves(value_B.to(time_BGE) / told.scale))[:, None]


def waves(value: Tensor, count: int = _WAVES, fastest: float = _FASTEST) -> Tensor:
    """Cosines and sines `[..., count]` of numbers `[...]`, from 1 to `fastest` radians per unit."""
    rates = torch.exp(torch.linspace(0, math.log(fastest), count // 2, dtype=value.dtype, device=value.device))
    angle = value[..., None] * rates
    return torch.cat([angle.cos(), angle.sin()], -1)
