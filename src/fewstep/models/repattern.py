"""A copy of a network with another attention pattern: for checks, and for patterns without training."""

from __future__ import annotations

import copy
from typing import Any

from fewstep.attention import Operation, Pattern
from fewstep.models.denoiser import Denoiser


def repattern(network: Denoiser, pattern: Pattern) -> Denoiser:
    """A second network over the same tensors, whose blocks read what `pattern` says. Operations are new.

    ValueError for a network whose attention takes no pattern, or not this one.
    """
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    backbone: Any = twin.backbone
    hosts = [(layer, host) for layer, block in enumerate(backbone.blocks) for host in block.modules() if _reads(host)]
    if not hosts:
        raise ValueError(
            f"the attention of a {type(backbone).__name__} takes no pattern; take a transformer of the list"
        )
    for layer, host in hosts:
        host.operation = pattern.operation(layer, backbone.heads, backbone.width // backbone.heads)
    for holder in backbone.modules():
        if isinstance(getattr(holder, "pattern", None), Pattern):
            holder.pattern = pattern
    backbone.args = {**backbone.args, "pattern": pattern.tree()}
    return twin


def _reads(module: Any) -> bool:
    return isinstance(getattr(module, "operation", None), Operation)
