"""Output scales per step: `s_k * layer(x)` in step k, with s_k `[out]`, 1 until they are trained.

The inputs of a layer change their size and shape during sampling, which one set of 8-bit weights serves badly (PTQ4DM,
2211.15736). Scales of each step's own can correct what is linear in it, for few weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.compress.linear import chosen
from fewstep.compress.stepwise import StepLinear, stepwise
from fewstep.compress.transform import Transform


@dataclass(frozen=True, kw_only=True)
class StepScales(Transform):
    """Linear layers of the blocks have output scales of each sampling step's own."""

    steps: int
    """Number of steps that the network is sampled in; it can be sampled in no other number."""
    targets: tuple[str, ...] = ()
    """Layers that get scales, by the last parts of their names; empty: all linear layers of the blocks."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def identity(self) -> bool:
        return True

    def apply(self, network: Any) -> Any:
        for name, parent, child, layer in chosen(network, self.targets):
            if not name.startswith("blocks."):
                raise ValueError(
                    f"only layers of the blocks know the step, and {name} is in none; leave it out of targets"
                )
            setattr(parent, child, Scaled(layer, self.steps))
        return stepwise(network)

    def check(self, counts: Collection[int]) -> None:
        if set(counts) != {self.steps}:
            raise ValueError(
                f"StepScales has scales for {self.steps} steps, and the student is sampled in {', '.join(map(str, counts))}; "
                "give it the number of steps of a method with one grid"
            )


class Scaled(StepLinear):
    """A linear layer with one row of output scales per step, `[S, out]`."""

    def __init__(self, base: Any, steps: int) -> None:
        super().__init__(base, steps)
        weight = base.weight
        self.scale = nn.Parameter(torch.ones(steps, self.out_features, device=weight.device, dtype=weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The argument has `nn.Linear`'s name, by which some networks give it."""
        made: Tensor = self.base(input)
        return made * self.own(self.scale).to(made.dtype)
