"""A copy of a network with another attention pattern: for checks, and for patterns without training."""

from __future__ import annotations

import copy
from typing import Any

from fewstep.attention import Pattern
from fewstep.compress.repatterned import follow
from fewstep.models.denoiser import Denoiser


def repattern(network: Denoiser, pattern: Pattern) -> Denoiser:
    """A second network over the same tensors, whose blocks read what `pattern` says. Operations are new.

    ValueError for a network whose attention takes no pattern, or not this one.
    """
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    backbone: Any = twin.backbone
    follow(backbone, pattern)
    backbone.args = {**backbone.args, "pattern": pattern.tree()}
    return twin
