"""Networks that are told their guidance (2210.03142, latent consistency models): with one scale for all clips, a constant.

The features of w are projected and added to those of the time, before the first layer of the time's embedding:
`linear_1(time + P f(w)) = W time + (b + W P f(w))`. So the network of one scale is one without that input and with another bias.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.known.weights import Weights

_PROJECTION = "time_embedding.cond_proj.weight"
_WEIGHT, _BIAS = "time_embedding.linear_1.weight", "time_embedding.linear_1.bias"


def features(scale: float, width: int) -> Tensor:
    """What such a network reads of a guidance `uncond + scale (cond - uncond)`: sines and cosines of `1000 (scale - 1)`."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / (width // 2 - 1)))
    angles = 1000.0 * (scale - 1.0) * rates
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)])


def told(weights: Weights, scale: float) -> Weights:
    """The weights of a network that is told `scale`, without the input for it. ValueError for one without such an input."""
    if _PROJECTION not in weights.names:
        raise ValueError(
            f"there is no {_PROJECTION} in the file: this network is not told its guidance, so it is another than its name says"
        )
    return _Told(weights, scale)


@dataclass(frozen=True)
class _Told(Weights):
    inner: Weights
    scale: float

    @property
    def names(self) -> Collection[str]:
        return [name for name in self.inner.names if name != _PROJECTION]

    def read(self, name: str) -> Tensor:
        if name != _BIAS:
            return self.inner.read(name)
        projection = self.inner.read(_PROJECTION).float()
        shift = self.inner.read(_WEIGHT).float() @ projection @ features(self.scale, projection.shape[1])
        return self.inner.read(_BIAS).float() + shift
