"""Networks by role, made from a model and what a method asks for."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.core import Rng
from fewstep.methods.base import Copy, Heads, Method, Nets, Update, Weak
from fewstep.models import FeatureHeads, VideoModel
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import Lora, adapt, duplicate, weaken


def build_nets(
    model: VideoModel, method: Method, seed: int, lora: Lora | None = None, device: str | None = None
) -> Nets:
    """Teacher (the model's own network), student (a copy of it) and the method's roles, in that order.

    With `lora` no copy is made: each is a set of adapters over the teacher's weights. What is made new goes to `device`,
    or where the network is whose features it reads.
    """
    roles: dict[str, nn.Module] = {"teacher": model.part(method.part)}
    roles["student"] = _second(roles, "teacher", "student", lora, seed)
    for role, recipe in method.aux().items():
        if role in (*roles, "ema"):
            raise ValueError(f"a method cannot redefine the role {role!r}")
        if recipe.of not in roles:
            raise ValueError(f"role {role!r} is made from {recipe.of!r}, which this run does not have")
        match recipe:
            case Copy(of):
                roles[role] = _second(roles, of, role, lora, seed)
            case Weak(of, scale):
                roles[role] = weaken(_denoiser(roles[of]), scale)
            case Heads(of, layers):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    heads = FeatureHeads(widths=_widths(roles[of], layers), layers=layers)
                roles[role] = heads.to(device or next(roles[of].parameters()).device)
    for network in roles.values():
        network.requires_grad_(False)
    return Nets(roles)


def trained_roles(method: Method, steps: int) -> tuple[str, ...]:
    """Every role that some update of the run trains, in order of appearance."""
    seen: dict[str, None] = {}
    possible = {"student", *(role for role, recipe in method.aux().items() if not isinstance(recipe, Weak))}
    for step in range(steps):
        for event in method.updates(step):
            if isinstance(event, Update):
                seen |= dict.fromkeys(event.roles)
        if seen.keys() >= possible:
            break
    return tuple(seen)


def _second(roles: dict[str, nn.Module], of: str, role: str, lora: Lora | None, seed: int) -> nn.Module:
    """A network that starts as the role `of`: a copy, or adapters over the teacher."""
    if lora is None or of != "teacher":
        return duplicate(roles[of])
    return adapt(_denoiser(roles[of]), lora, Rng(seed).fold(f"lora/{role}"))


def _widths(network: nn.Module, layers: tuple[int, ...]) -> list[int]:
    widths = _denoiser(network).backbone.widths
    if not all(-len(widths) <= layer < len(widths) for layer in layers):
        raise ValueError(f"feature layers must be in [-{len(widths)}, {len(widths) - 1}], got {list(layers)}")
    return [widths[layer] for layer in layers]


def _denoiser(network: nn.Module) -> Denoiser:
    """ValueError for anything else."""
    if not isinstance(network, Denoiser):
        raise ValueError(f"discriminator heads and adapters are for denoisers, not for {type(network).__name__}")
    return network
