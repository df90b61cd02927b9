"""Load a model's networks: tensor by tensor, each into the type that it is run in, so that nothing is in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewstep.compress import transformed
from fewstep.models.denoiser import Denoiser
from fewstep.models.runtime import Dtype, Runtime, typed
from fewstep.models.stored import Stored

if TYPE_CHECKING:
    from fewstep.models.bundle import Card, VideoModel


Give = Callable[..., Stored | None]
"""`adapters.load`: gives a part of the meta device its weights, or with `leave` returns them in their files, if names allow."""


def loaded(
    model: VideoModel, folder: Path, give: Give, *, leave: Collection[str], trust: bool, runtime: Runtime
) -> VideoModel:
    """A model without networks, with those of its card. `folder` has the weights of parts without a source of their own."""
    runtime.require(model)  # before anything is read
    card = model.card
    for name in card.parts:
        dtype: Dtype = runtime.dtype if name == "denoiser" and name not in leave else "float32"
        if name in card.sources:
            part, weights = _elsewhere(name, card, give, leave)
        else:
            part, weights = _here(name, card, folder, trust)
        if weights is not None and name not in leave:
            part = _filled(name, card, weights, dtype)
        elif dtype != "float32" and isinstance(part, Denoiser):
            model.parts[name] = part
            model.rounded[name] = model.fingerprint(name)
            typed(part, dtype)
        if weights is not None and (name in leave or dtype != "float32"):
            model.stored[name] = weights
        model.parts[name] = part.eval()
    model.runtime = replace(model.runtime, dtype=runtime.dtype)
    return model.prepared(runtime)


def allocate(part: str, card: Card) -> nn.Module:
    """The network of one part, with fresh weights."""
    network = card.parts[part].build()
    return Denoiser(transformed(network, card.transforms), card.path, card.kind) if part == "denoiser" else network


def sketch(part: str, card: Card) -> nn.Module:
    """The network of one part without memory for its weights: every tensor is on the meta device."""
    with torch.device("meta"):
        return allocate(part, card)


def _elsewhere(name: str, card: Card, give: Give, leave: Collection[str]) -> tuple[nn.Module, Stored | None]:
    """A part from a source of its own: with its weights, or on the meta device and its weights in their files."""
    part, changes = sketch(name, replace(card, transforms=())), card.transforms if name == "denoiser" else ()
    apart = name == "denoiser" or name in leave
    weights = give(part, card.sources[name], leave=apart and not changes)
    if changes:
        part.backbone = transformed(part.backbone, changes)
    return part, weights


def _here(name: str, card: Card, folder: Path, trust: bool) -> tuple[nn.Module, Stored]:
    """A part on the meta device, and its weights in a file of the folder."""
    path, part = folder / f"{name}.safetensors", sketch(name, card)
    known = {path: card.files[name]} if name in card.files and not trust else {}
    weights = Stored([path], part.state_dict(), stamps=known)
    weights.require_matching(part, path)
    return part, weights


def _filled(name: str, card: Card, weights: Stored, dtype: Dtype) -> nn.Module:
    """A part whose tensors are those of `weights`."""
    part = sketch(name, card)
    if any(module._non_persistent_buffers_set for module in part.modules()):
        part = allocate(name, card)  # which computes what no file has
    if isinstance(part, Denoiser):
        typed(part, dtype)
    own = {key: tensor.dtype for key, tensor in part.state_dict().items()}
    part.load_state_dict({key: weights.read(key, own[key]) for key in weights}, assign=True)
    return part
