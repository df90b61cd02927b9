"""A Wan whose student has two experts by time, as what diffusers knows it by: a Wan 2.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fewstep.attention import Pattern
from fewstep.models.adapters.dits.wan import Wan
from fewstep.models.adapters.dits.wan_experts import WanExperts
from fewstep.models.backbone import Backbone
from fewstep.models.denoiser import Denoiser
from fewstep.models.experts import Experts

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


def as_wan22(model: VideoModel) -> VideoModel:
    """The model with the class `WanExperts`, over the same tensors, if its denoiser is a Wan with two experts by time and no
    other transform. Any other model is returned as it is."""
    network = model.denoiser.backbone
    if not _is_pair(network):
        return model
    first: Any = network.expert(0)
    pattern: Pattern = first.pattern
    with torch.device("meta"):
        pair = WanExperts(config=first.args["config"], boundaries=list(network.boundaries), pattern=pattern)
    pair.hold([network.expert(index) for index in range(2)])
    made = Denoiser(pair, model.denoiser.path, model.denoiser.kind)
    return model.with_part("denoiser", made)


def two_experts(index: dict[str, Any], network: Backbone) -> dict[str, Any]:
    """A `model_index.json` of one Wan, as it is for the pair; any other index as it is."""
    if not isinstance(network, WanExperts) or index.get("boundary_ratio") is not None:
        return index
    return {**index, "transformer_2": index["transformer"], "boundary_ratio": network.boundaries[0]}


def _is_pair(network: Backbone) -> bool:
    if type(network) is not Experts or len(network.transforms) != 1 or len(network.boundaries) != 1:
        return False
    one = network.expert(0)
    return isinstance(one, Wan) and not one.first_frame
