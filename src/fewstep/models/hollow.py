"""Networks without values: their code runs, and what it would take in memory can be counted."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def imagine(network: nn.Module, mode: FakeTensorMode) -> None:
    """Move a network from the meta device to a CPU without memory: autocast and attention do not know the meta device."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that two modules share stays one
    with mode:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[parameter] = nn.Parameter(empty, requires_grad=False)
                    module._parameters[name] = made[parameter]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
