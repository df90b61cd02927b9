"""Measure how weights change: a fixed sample of them, before and after one iteration."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.models.depot import depot_of
from fewstep.models.lora import adapters

SAMPLED = 1 << 16
"""Size of the sample, spread over all tensors: a share is known to 0.2 percentage points."""


@torch.no_grad()
def sample(network: nn.Module) -> Tensor:
    """Every n-th weight of a network, as a float32 copy on the CPU.

    A sharded network gives the weights of this process; a network with adapters, the weights that the adapters change, with
    that change. Where a depot has these, every process must call.
    """
    layers, depot = adapters(network), depot_of(network)
    own = [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
    count = sum(tensor.numel() for tensor in ([layer.weight for layer in layers.values()] or own))
    stride = max(1, count // SAMPLED)

    def picked(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten()[::stride].float().cpu()

    def changed(within: nn.Module) -> list[Tensor]:
        return [picked(layer.weight + layer.update) for layer in adapters(within).values()]  # one at a time

    if not layers:
        return torch.cat([picked(tensor) for tensor in own]).clone()
    if depot is None:
        return torch.cat(changed(network)).clone()
    found = [depot.reading(block, changed) for block in network.backbone.blocks]  # type: ignore[union-attr]
    ends = [picked(layer.weight + layer.update) for layer in layers.values() if not layer.weight.is_meta]
    return torch.cat([*chain(*found), *ends])


def moved(before: Tensor, after: Tensor) -> float:
    """Share of weights that differ."""
    return float((before != after).double().mean())


def change(before: Tensor, after: Tensor) -> float:
    """`|after - before| / |before|`."""
    return float((after.double() - before.double()).norm() / before.double().norm().clamp_min(1e-30))


def coarse(weights: Tensor) -> float:
    """Share of weights that are exact in bfloat16. Zeros, which every format holds, are left out."""
    some = weights[weights != 0]
    return float((some == some.bfloat16().float()).double().mean()) if len(some) else 0.0
