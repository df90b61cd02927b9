"""Linear layers that know the sampler's step, and the block that tells them.

A linear layer is called with its input alone, often deep inside a block of another library. So the block makes a view of
itself for each call: modules over the same tensors, in which every such layer is the one of the call's step. Nothing is
written on the network: two runs may be at different steps, and a block that is computed again in the backward pass is
at the step of its own call.
"""

from __future__ import annotations

import copy
from typing import Any, Self

from torch import Tensor, nn

from fewstep.core import Call


class StepLinear(nn.Module):
    """A linear layer whose numbers depend on the step. A transform puts one in a layer's place (`stepwise`)."""

    step: int | None = None
    """Step of this view, from 0; None in the network itself."""

    def __init__(self, base: Any, steps: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base, self.steps = base.in_features, base.out_features, base, steps

    @property
    def weight(self) -> Tensor:
        """The weights of the layer inside, which some networks look at."""
        weight: Tensor = self.base.weight
        return weight

    def at(self, call: Call) -> Self:
        """A view that computes what this layer does in that step. ValueError for another number of steps."""
        if call.steps != self.steps:
            raise ValueError(
                f"this network has layers for {self.steps} steps, and was called for step {call.step + 1} of {call.steps}; "
                f"sample it in {self.steps} steps, and train it by a rollout that samples so (BackwardSimulation)"
            )
        view = copy.copy(self)
        view.step = call.step
        return view

    def own(self, values_S: Tensor) -> Tensor:
        """What belongs to this view's step, of values by step. ValueError outside of a block that knows the step."""
        if self.step is None:
            raise ValueError("this layer depends on the step, and was called outside of a block that knows it")
        return values_S[self.step]


class StepBlock(nn.Module):
    """A block that tells its layers the step of the call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Any) -> Any:
        return _view(self.inner, state.place.call)(state)


def stepwise(network: Any) -> Any:
    """Let every block of a backbone that has such layers tell them the step."""
    network.blocks = nn.ModuleList(_telling(block) for block in network.blocks)
    return network


def knows_steps(network: nn.Module) -> bool:
    """Whether what the network computes depends on the number of the step."""
    return any(isinstance(module, StepLinear) for module in network.modules())


def _telling(block: nn.Module) -> nn.Module:
    return StepBlock(block) if knows_steps(block) and not isinstance(block, StepBlock) else block


def _view(module: nn.Module, call: Call) -> nn.Module:
    """The module at a step: itself where nothing in it depends on the step."""
    if isinstance(module, StepLinear):
        return module.at(call)
    views = {name: _view(child, call) for name, child in module.named_children()}
    changed = {name: view for name, view in views.items() if view is not module._modules[name]}
    if not changed:
        return module
    made = copy.copy(module)
    made._modules = {**module._modules, **changed}
    return made
