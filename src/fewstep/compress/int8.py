"""Linear layers with 8-bit weights and a scale per output channel: a quarter of the memory, the same arithmetic.

`s = max|w| / 127` of each row, `q = round(w / s)` (half to even), and `w' = s q`: every weight is within `s / 2` of what it was.
Weights are read as floats for the product, so this saves memory and not computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.compress.linear import chosen, ends
from fewstep.compress.transform import Transform

_LARGEST = 127
"""Symmetric: -128 is not used."""


@dataclass(frozen=True, kw_only=True)
class Int8(Transform):
    """The linear layers of the blocks hold 8-bit weights. They cannot be trained; adapters over them can."""

    trainable: ClassVar[bool] = False

    targets: tuple[str, ...] = ()
    """Layers to quantise, by the last parts of their names, such as `mlp.up`; empty: all linear layers of the blocks."""
    keep: tuple[str, ...] = ()
    """Layers to keep as they are, by the last parts of their names."""

    @property
    def identity(self) -> bool:
        return False

    def apply(self, network: Any) -> Any:
        for name, parent, child, layer in chosen(network, self.targets):
            if any(ends(name, kept) for kept in self.keep):
                continue
            if type(layer) is not nn.Linear:
                raise ValueError(
                    f"Int8 quantises plain linear layers, and {name} is a {type(layer).__name__}; put Int8 before the "
                    "transform that made it, or name the layer in keep"
                )
            setattr(parent, child, Int8Linear(layer))
        return network


class Int8Linear(nn.Module):
    """`x (s q)^T + b`, made of a linear layer: q `[out, in]` int8, s `[out, 1]`, b the layer's own."""

    quantised: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        quantised, scale = quantise(layer.weight.detach())
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """The weights as floats."""
        return self.scale * self.quantised.to(self.scale.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The argument has `nn.Linear`'s name, by which some networks give it."""
        return F.linear(input, self.weight, self.bias)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q and s of a matrix `[out, in]`. A row of zeros has the scale 1."""
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / _LARGEST).to(weight.dtype)
    return (weight / scale).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale
