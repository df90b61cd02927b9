"""Load a model's networks: tensor by tensor, each into the type that it is run in, so that nothing is in memory twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fewstep.compress import transformed
from fewstep.models import adapters
from fewstep.models.card import Card, allocate, sketch
from fewstep.models.denoiser import Denoiser
from fewstep.models.fingerprint import print_of
from fewstep.models.runtime import Dtype, Runtime, typed
from fewstep.models.stored import Stored

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


def loaded(model: VideoModel, folder: Path, *, leave: Collection[str], trust: bool, runtime: Runtime) -> VideoModel:
    """A model without networks, with those of its card. `folder` has the weights of parts without a source of their own."""
    runtime.require(model)  # before anything is read
    card = model.card
    for name in card.parts:
        dtype: Dtype = runtime.dtype if name == "denoiser" and name not in leave else "float32"
        if name in card.sources:
            part, weights = _elsewhere(name, card, leave)
        else:
            part, weights = _here(name, card, folder, trust)
        if weights is not None and name not in leave:
            part = _filled(part, name, card, weights, dtype)
        elif dtype != "float32" and isinstance(part, Denoiser):
            model.rounded[name] = print_of(part, part.state_dict())
            typed(part, dtype)
        if weights is not None and (name in leave or dtype != "float32"):
            model.stored[name] = weights
        model.parts[name] = part.eval()
    model.runtime = replace(model.runtime, dtype=runtime.dtype)
    return model.prepared(runtime)


def _elsewhere(name: str, card: Card, leave: Collection[str]) -> tuple[nn.Module, Stored | None]:
    """A part from a source of its own: with its weights, or on the meta device and its weights in their files."""
    part, changes = sketch(name, replace(card, transforms=())), card.transforms if name == "denoiser" else ()
    apart = (name == "denoiser" or name in leave) and not changes
    weights = adapters.stored(part, card.sources[name]) if apart else None
    if weights is None:
        adapters.load(part, card.sources[name])
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


def _filled(part: nn.Module, name: str, card: Card, weights: Stored, dtype: Dtype) -> nn.Module:
    """A part on the meta device with the tensors of `weights`."""
    if any(module._non_persistent_buffers_set for module in part.modules()):
        part = allocate(name, card)  # which computes what no file has
    if isinstance(part, Denoiser):
        typed(part, dtype)
    own = {key: tensor.dtype for key, tensor in part.state_dict().items()}
    part.load_state_dict({key: weights.read(key, own[key]) for key in weights}, assign=True)
    return part
