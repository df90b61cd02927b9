"""Networks in the number type of their files. What diffusers keeps in float32, whatever it is told, keeps it here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from fewstep.models.backbone import Original
from fewstep.models.denoiser import Denoiser

Dtype = Literal["float32", "bfloat16", "float16"]


def types_of(network: nn.Module, dtype: Dtype) -> dict[str, torch.dtype]:
    """The type of every number of a network of diffusers, by name."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    wanted: torch.dtype = getattr(torch, dtype)
    return {
        name: torch.float32 if kept.intersection(name.split(".")) else wanted
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }


def narrowed(network: nn.Module, dtype: Dtype) -> nn.Module:
    """A copy in these types; the network itself for float32."""
    if dtype == "float32":
        return network
    types, memo = types_of(network, dtype), dict[int, object]()
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if name in types:
            rounded = value.detach().to(types[name])
            memo[id(value)] = nn.Parameter(rounded, False) if isinstance(value, nn.Parameter) else rounded
    return copy.deepcopy(network, memo)


def own_types(denoiser: Denoiser, original: Original, dtype: Dtype) -> Mapping[str, torch.dtype]:
    """The same by the denoiser's own names."""
    types = {folder: types_of(network, dtype) for folder, network in original.networks.items()}
    found = {}
    for name in denoiser.backbone.state_dict():
        folder, _, within = denoiser.backbone.foreign(name).rpartition("/")
        kinds = types[folder or next(iter(types))]
        if within in kinds:
            found[f"backbone.{name}"] = kinds[within]
    return found
