"""A network of diffusers around the weights of an adapter."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import ModelMixin

from fewstep.models.backbone import Backbone


def rebuilt(network: type[ModelMixin], adapter: Backbone) -> ModelMixin:
    """A `network` of the adapter's `config` that holds its very tensors by diffusers' names, frozen, in eval mode."""
    weights = {adapter.foreign(name): tensor for name, tensor in adapter.state_dict().items()}
    with init_empty_weights(include_buffers=False):  # buffers that are not saved are computed
        made = network.from_config(adapter.args["config"])
    made.load_state_dict(weights, assign=True)
    device = next(iter(weights.values())).device
    for buffer in made.buffers():
        buffer.data = buffer.data.to(device)
    return made.requires_grad_(False).eval()
