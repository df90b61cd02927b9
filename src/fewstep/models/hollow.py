"""Networks without values: their code runs, and what it would take in memory can be counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.attention import Ulysses


@dataclass(frozen=True)
class Absent(Ulysses):
    """Processes that share every clip, of which only this one is there: what it computes has the right shapes, and no values."""

    group: dist.ProcessGroup = cast(dist.ProcessGroup, None)
    count: int = 1

    @property
    def size(self) -> int:
        return self.count

    def own(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.count, dim)[0].contiguous()

    def join(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat([x] * self.count, dim)

    def exchange(self, x: Tensor) -> Tensor:
        return x.contiguous().clone()


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
