"""Networks by role, made from a model and the requests of a method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from fewstep.diffusion.prediction import determinant
from fewstep.engine.settings import Settings
from fewstep.methods.base import Method, Nets, Sync, Update
from fewstep.methods.roles import Copy, Making
from fewstep.models import Card, Denoiser, Lora, VideoModel
from fewstep.models.card import latent_shape_of, text_width_of
from fewstep.models.source import MADE_NEW, ModelSource, Pretrained

_LOOKED_AT = 10_000
"""Number of first iterations whose updates are listed, with the last one: a role that is trained once is trained again."""


def build_nets(
    model: VideoModel,
    method: Method,
    seed: int,
    lora: Lora | None = None,
    device: str | None = None,
    others: Mapping[str, VideoModel] = MappingProxyType({}),
) -> Nets:
    """Teacher (the model's own network), student (a copy of it) and the method's roles, in that order.

    With `lora` nothing is copied: each role is a set of adapters over the weights of the teacher or of another frozen
    network. A new network is made on `device`, or on the device of the network whose features it reads. `others` are the
    models of `sources`, and under `student` the model whose denoiser the student starts as, if it is no copy of the teacher.
    """
    roles: dict[str, nn.Module] = {"teacher": model.part(method.part)}
    codec = model.parts.get("codec")
    making = Making(roles=roles, seed=seed, lora=lora, device=device, others=others, codec=codec)
    begun = others.get("student")
    if begun is not None:
        roles["student"] = begun.denoiser
    if begun is None or lora is not None:
        roles["student"] = Copy("teacher" if begun is None else "student").make("student", making)
    for name, role in method.aux().items():
        if name in (*roles, "ema"):
            raise ValueError(
                f"the method redefines the role {name!r}, which every run has; give its own network another name"
            )
        if role.needs is not None and role.needs not in roles:
            raise ValueError(
                f"role {name!r} is made from {role.needs!r}, which this run does not have; it has {', '.join(roles)}"
            )
        roles[name] = role.make(name, making)
    for network in roles.values():
        network.requires_grad_(False)
    return Nets(roles)


def build_for(
    settings: Settings,
    model: VideoModel,
    method: Method,
    others: Mapping[str, VideoModel],
    device: str | None = None,
    settle: Callable[[str, Denoiser], None] = lambda role, denoiser: None,
) -> Nets:
    """The networks as `settings` keep them: frozen ones narrow, if it says so (`settings.frozen`). `settle` is then told of
    each frozen network that has its final type, before adapters borrow its weights."""
    frozen = {"teacher": model} | {role: other for role, other in others.items() if role in lenders(method)}
    if settings.lora is not None:
        _settle({**frozen, **others}, settings, settle)
    nets = build_nets(model, method, settings.seed, settings.lora, device, others)
    if settings.lora is None and settings.frozen == "bf16":  # after exact copies were made of them
        _settle(frozen, settings, settle)
    return nets


def _settle(models: Mapping[str, VideoModel], settings: Settings, settle: Callable[[str, Denoiser], None]) -> None:
    for role, model in models.items():
        if "denoiser" in model.parts:
            if settings.frozen == "bf16" and not model.denoiser.rounded:
                model.retype("bfloat16")
            settle(role, model.denoiser)


def sources(method: Method) -> dict[str, ModelSource]:
    """Where the method's networks of other models come from, by role."""
    return {name: role.source for name, role in method.aux().items() if role.source is not None}


def lenders(method: Method) -> tuple[str, ...]:
    """Roles that stay what a whole model was when the run began: the teacher, and frozen networks of other models."""
    aux = method.aux()
    return "teacher", *(name for name, role in aux.items() if role.source is not None and not role.trainable)


def origin(method: Method, role: str, stored: Collection[str]) -> str:
    """The role whose `stored` weights `role` starts with: itself, else the role it is copied from, else that one's origin."""
    if role in stored:
        return role
    of = {"student": Copy("teacher"), "ema": Copy("student"), **method.aux()}.get(role)
    return "teacher" if of is None or of.origin is None else origin(method, of.origin, stored)


def starts(settings: Settings) -> dict[str, ModelSource]:
    """Models whose weights a trained role starts with, by role, for roles that do not start from another role."""
    return {} if settings.start is None else {"student": Pretrained(source=settings.start)}


def require_alike(method: Method, card: Card) -> None:
    """Refuse (ValueError) another model if its networks cannot read what this run's model makes: latents, text states, and
    noise on its path. One that sees single frames may have a path of its own."""
    for role, made in method.aux().items():
        if made.source is None:
            continue
        other, like = made.source.card(), replace(card, num_frames=1) if made.stills else card
        if "denoiser" not in other.parts:
            raise ValueError(f"the method's {role}: {other.name!r} has no denoiser; it has {', '.join(other.parts)}")
        if not made.trainable and other.fingerprints.get("denoiser") == MADE_NEW:
            raise ValueError(
                f"the method's {role}: {other.name!r} is made new, and stays as it is made, so it knows nothing; train it first "
                "(fewstep train), and give the folder of the result"
            )
        mine, theirs = _facts(card, like), _facts(other, like)
        if not made.stills:
            mine |= {"the path": card.path, "first frames as input:": "image" in card.parts}
            theirs |= {"the path": other.path, "first frames as input:": "image" in other.parts}
        for what, its in theirs.items():
            if its != mine.get(what, its):
                raise ValueError(
                    f"the method's {role}: {other.name!r} has {what} {its}, and {card.name!r} {mine[what]}; give a model that "
                    "was trained with the same autoencoder and text encoder, on the same noise path"
                )


def require_clean(card: Card) -> None:
    """Refuse (ValueError) a denoiser whose prediction does not tell the clean clip at t = 1, where students begin."""
    c = card.path.coeffs(torch.ones((), dtype=torch.float64))
    if abs(float(determinant(card.kind, c))) < 1e-9:
        raise ValueError(
            f"{card.name!r} predicts {card.kind}, which says nothing of the clean clip where {type(card.path).__name__} has no "
            "signal: at t = 1, where students begin; give a model of kind flow, v or x0, or a path that keeps some signal"
        )


def _facts(card: Card, like: Card) -> dict[str, object]:
    """What networks that read the same latents and text states have in common, for clips of the size of `like`."""
    facts: dict[str, object] = {}
    if "codec" in card.parts:
        size = {"num_frames": like.num_frames, "height": like.height, "width": like.width}
        facts["latents of shape"] = latent_shape_of(replace(card, **size))  # type: ignore[arg-type]
    if "text" in card.parts:
        facts |= {"a text encoder": card.parts["text"].type, "text states of width": text_width_of(card)}
    return facts


def trained_roles(method: Method, steps: int) -> tuple[str, ...]:
    """Every role that some update of the run trains, in order of appearance."""
    seen: dict[str, None] = {}
    possible = {"student", *(name for name, role in method.aux().items() if role.trainable)}
    for step in looked_at(steps):
        for event in method.updates(step):
            if isinstance(event, Update):
                seen |= dict.fromkeys(event.roles)
        if seen.keys() >= possible:
            break
    return tuple(seen)


def looked_at(steps: int) -> tuple[int, ...]:
    """Iterations that stand for all in a list of what a run does: the first ones, and the last."""
    return (*range(min(steps, _LOOKED_AT)), steps - 1)


def synced(method: Method, steps: int) -> set[tuple[str, str]]:
    """Target and source of every copy of weights in a run."""
    events = [event for step in range(min(steps, _LOOKED_AT)) for event in method.updates(step)]
    return {(event.target, event.source) for event in events if isinstance(event, Sync)}
