"""Low-rank branches next to linear layers: adapters that cannot be merged into a float weight.

`layer(x) + B (A x)`, with A `[rank, in]` and B `[out, rank]`. QLoRA (2305.14314) trains adapters over quantised weights;
here they stay beside them, so that the student that is saved is the student that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compress.linear import chosen
from fewstep.compress.transform import Transform
from fewstep.core import Rng


@dataclass(frozen=True, kw_only=True)
class Branches(Transform):
    """A low-rank branch beside linear layers, zero until it is trained."""

    rank: int = 32
    targets: tuple[str, ...] = ()
    """Layers that get a branch, by the last parts of their names; empty: all linear layers of the blocks."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def identity(self) -> bool:
        return True

    def apply(self, network: Any) -> Any:
        for name, parent, child, layer in chosen(network, self.targets):
            branched = Branched(layer, self.rank)
            if not branched.down.weight.is_meta:
                branched.begin(Rng(0), name)
            setattr(parent, child, branched)
        return network


class Branched(nn.Module):
    """A linear layer and the branch beside it."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base = base.in_features, base.out_features, base
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.utils.skip_init(nn.Linear, self.in_features, rank, bias=False, **place)
        self.up = nn.utils.skip_init(nn.Linear, rank, self.out_features, bias=False, **place)

    @property
    def weight(self) -> Tensor:
        """The weights that it comes to."""
        weight: Any = self.base.weight
        made: Tensor = weight + self.up.weight @ self.down.weight
        return made

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input))

    @torch.no_grad()
    def begin(self, rng: Rng, name: str) -> None:
        """First weights: the branch is 0, and its gradient is not."""
        first = 2 * rng.rand(tuple(self.down.weight.shape), name) - 1
        self.down.weight.copy_(first * self.in_features**-0.5)
        self.up.weight.zero_()
