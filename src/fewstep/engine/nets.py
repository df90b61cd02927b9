"""Networks by role, made from a model and what a method asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import nn

from fewstep.core import Rng
from fewstep.engine.settings import Settings
from fewstep.methods.base import Copy, Heads, Method, Nets, Other, Update, Weak
from fewstep.models import Card, FeatureHeads, JointHead, VideoModel
from fewstep.models.bundle import latent_shape_of, text_width_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import Lora, adapt, adapters, duplicate, weaken
from fewstep.models.source import ModelSource, Pretrained

_LOOKED_AT = 10_000
"""Iterations in the beginning whose updates are listed, and the last one: what begins to be trained goes on."""


def build_nets(
    model: VideoModel,
    method: Method,
    seed: int,
    lora: Lora | None = None,
    device: str | None = None,
    others: Mapping[str, VideoModel] = MappingProxyType({}),
) -> Nets:
    """Teacher (the model's own network), student (a copy of it) and the method's roles, in that order.

    With `lora` no copy is made: each is a set of adapters over the teacher's weights, or another frozen network's. What is
    made new goes to `device`, or where the network is whose features it reads. `others` are the models of `sources`
    and `starts`.
    """
    roles: dict[str, nn.Module] = {"teacher": model.part(method.part)}
    begun = others.get("student")
    roles["student"] = begun.denoiser if begun else _second(roles, "teacher", "student", lora, seed)
    for role, recipe in method.aux().items():
        if role in (*roles, "ema"):
            raise ValueError(f"a method cannot redefine the role {role!r}")
        if not isinstance(recipe, Other) and recipe.of not in roles:
            raise ValueError(f"role {role!r} is made from {recipe.of!r}, which this run does not have")
        match recipe:
            case Copy(of):
                roles[role] = _second(roles, of, role, lora, seed)
            case Weak(of, scale):
                roles[role] = weaken(_denoiser(roles[of]), scale)
            case Heads(of):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    heads = _heads(roles[of], recipe)
                roles[role] = heads.to(device or next(roles[of].parameters()).device)
            case Other():
                roles[role] = others[role].denoiser
    for network in roles.values():
        network.requires_grad_(False)
    return Nets(roles)


def sources(method: Method) -> dict[str, ModelSource]:
    """Where the method's frozen networks of other models come from, by role."""
    return {role: recipe.source for role, recipe in method.aux().items() if isinstance(recipe, Other)}


def origin(method: Method, role: str, stored: Collection[str]) -> str:
    """Whose `stored` weights `role` begins with: its own, or those of what it is a copy of."""
    if role in stored:
        return role
    of = {"ema": Copy("student"), **method.aux()}.get(role)
    return origin(method, of.of, stored) if isinstance(of, Copy) else "teacher"


def starts(settings: Settings) -> dict[str, ModelSource]:
    """Where the weights of a trained role come from, if not from another role."""
    return {} if settings.start is None else {"student": Pretrained(source=settings.start)}


def require_alike(method: Method, card: Card) -> None:
    """Refuse (ValueError) another model whose networks could not read the latents or text states of this run's."""
    for role, source in sources(method).items():
        other = source.card()
        if "denoiser" not in other.parts:
            raise ValueError(f"method.{role}: {other.name!r} has no denoiser; it has {', '.join(other.parts)}")
        here, there = ((latent_shape_of(c) or (None,))[0] for c in (card, other))
        for what, mine, its in (("latents", here, there), ("text states", text_width_of(card), text_width_of(other))):
            if None not in (mine, its) and mine != its:
                raise ValueError(
                    f"method.{role}: {other.name!r} has {what} of width {its}, and {card.name!r} of width {mine}; "
                    "give a model that was trained with the same autoencoder and text encoder"
                )


def trained_roles(method: Method, steps: int) -> tuple[str, ...]:
    """Every role that some update of the run trains, in order of appearance."""
    seen: dict[str, None] = {}
    possible = {"student", *(role for role, recipe in method.aux().items() if not isinstance(recipe, Weak | Other))}
    for step in (*range(min(steps, _LOOKED_AT)), steps - 1):
        for event in method.updates(step):
            if isinstance(event, Update):
                seen |= dict.fromkeys(event.roles)
        if seen.keys() >= possible:
            break
    return tuple(seen)


def _second(roles: dict[str, nn.Module], of: str, role: str, lora: Lora | None, seed: int) -> nn.Module:
    """A network that starts as the role `of`: a copy, or adapters over a frozen network."""
    if lora is None or adapters(roles[of]):
        return duplicate(roles[of])
    return adapt(_denoiser(roles[of]), lora, Rng(seed).fold(f"lora/{role}"))


def _heads(network: nn.Module, recipe: Heads) -> nn.Module:
    widths = _widths(network, recipe.layers)
    return JointHead(widths) if recipe.joint else FeatureHeads(widths=widths, layers=recipe.layers)


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
