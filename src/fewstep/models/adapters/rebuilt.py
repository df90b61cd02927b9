"""A network of diffusers around tensors that are already there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor


def rebuilt(network: type[ModelMixin], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ModelMixin:
    """A `network` of `config` that holds these very `weights` (named as diffusers names them), frozen, in eval mode."""
    with init_empty_weights(include_buffers=False):  # buffers that are not saved are computed
        made = network.from_config(config)
    made.load_state_dict(dict(weights), assign=True)
    placed = next(iter(weights.values()))
    for buffer in made.buffers():
        buffer.data = buffer.data.to(placed.device)
    return made.requires_grad_(False).eval()
