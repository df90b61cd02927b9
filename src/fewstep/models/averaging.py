"""Averages of networks."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.models.lora import adapters


@torch.no_grad()
def blend(target: nn.Module, source: nn.Module, decay: float) -> None:
    """`target <- decay * target + (1 - decay) * source` for parameters and floating-point buffers; for shards, each its own.

    Adapters are averaged by what they add to the weights, not factor by factor.
    """
    if decay > 0 and adapters(target):  # such a network has no other weights of its own
        for layer, other in zip(adapters(target).values(), adapters(source).values(), strict=True):
            layer.average(other, decay)
        return
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        mine, theirs = (t.to_local() if isinstance(t, DTensor) else t for t in (mine, theirs))
        if mine.is_floating_point():
            mine.lerp_(theirs.to(mine.device), 1 - decay)
        else:
            mine.copy_(theirs)
