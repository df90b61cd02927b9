"""Networks by role, made from a model and what a method asks for."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fewstep.methods.base import Copy, Heads, Method, Nets, Update
from fewstep.models import FeatureHeads, VideoModel
from fewstep.models.denoiser import Denoiser


def build_nets(model: VideoModel, method: Method, seed: int, device: str | None = None) -> Nets:
    """Teacher (the model's own network), student (a copy of it) and the method's roles, in that order.

    What is made new goes to `device`, or where the network is whose features it reads.
    """
    teacher = model.part(method.part)
    roles: dict[str, nn.Module] = {"teacher": teacher, "student": copy.deepcopy(teacher)}
    for role, recipe in method.aux().items():
        if role in (*roles, "ema"):
            raise ValueError(f"a method cannot redefine the role {role!r}")
        if recipe.of not in roles:
            raise ValueError(f"role {role!r} is made from {recipe.of!r}, which this run does not have")
        match recipe:
            case Copy(of):
                roles[role] = copy.deepcopy(roles[of])
            case Heads(of, layers):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    heads = FeatureHeads(width=_width(roles[of]), layers=layers)
                roles[role] = heads.to(device or next(roles[of].parameters()).device)
    for network in roles.values():
        network.requires_grad_(False)
    return Nets(roles)


def trained_roles(method: Method, steps: int) -> tuple[str, ...]:
    """Every role that some update of the run trains, in order of appearance."""
    seen: dict[str, None] = {}
    possible = {"student", *method.aux()}
    for step in range(steps):
        for event in method.updates(step):
            if isinstance(event, Update):
                seen |= dict.fromkeys(event.roles)
        if seen.keys() >= possible:
            break
    return tuple(seen)


def _width(network: nn.Module) -> int:
    if not isinstance(network, Denoiser):
        raise ValueError(f"discriminator heads read the features of a denoiser, not of {type(network).__name__}")
    return network.backbone.width
