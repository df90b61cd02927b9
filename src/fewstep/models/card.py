"""The card of a folder of weights: which networks it holds, and how a clip is sampled with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fewstep.attention import KEEPS, PATTERNS
from fewstep.compress import TRANSFORMS, Transform, transformed
from fewstep.core import RecipeError, build
from fewstep.core.bounds import FrameRate, Size, require_bounds
from fewstep.diffusion import NAMED, Contract, Kind, NoisePath, RectifiedFlow
from fewstep.models.denoiser import Denoiser
from fewstep.models.spec import Spec

PARTS = ("denoiser", "text", "image", "codec", "features")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a folder of weights says of itself."""

    name: str
    role: Literal["teacher", "student"] = "teacher"
    parts: dict[str, Spec] = field(default_factory=dict)
    """Class and constructor arguments of every network; the denoiser's entry is its backbone."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source of each part whose weights are not in this folder: a folder in diffusers' layout or its hub name."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each part's loaded weights. Data made with other weights is refused before it is read."""
    transforms: tuple[Transform, ...] = ()
    """Transforms of the denoiser relative to its entry in `parts`, in the order of application."""
    files: dict[str, str] = field(default_factory=dict)
    """Length and digest of each part's file as written; loading detects damage."""
    path: NoisePath = RectifiedFlow()
    kind: Kind = "flow"
    contract: Contract = Contract()
    num_frames: Size = 16
    height: Size = 32
    width: Size = 32
    fps: FrameRate = 8
    negative_prompt: str = ""
    """Negative prompt for guidance."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Recipe hash, teacher and data fingerprints, licences, machine, versions: free text by name."""
    scores: dict[str, float] = field(default_factory=dict)
    """Measured figures by name; the name contains n."""

    def __post_init__(self) -> None:
        require_bounds(self)
        for field_, names in (("parts", self.parts), ("sources", self.sources), ("files", self.files)):
            if unknown := sorted(set(names) - set(PARTS)):
                raise ValueError(
                    f"{field_}: {unknown[0]!r} is no part of a video model; its parts are {', '.join(PARTS)}"
                )


def parse_card(tree: Any, where: str) -> Card:
    """The card of its plain values. RecipeError says what is wrong with them, or that they would import code."""
    if not (isinstance(tree, dict) and tree.get("parts")):
        raise RecipeError(f"{where}: parts is empty or missing, so there is no network to load; copy the folder again")
    names = {cls.__name__: cls for classes in (NAMED, TRANSFORMS, PATTERNS, KEEPS) for cls in classes}
    card: Card = build(Card, tree, names, where)
    return card


def allocate(part: str, card: Card) -> nn.Module:
    """The network of one part, with fresh weights."""
    network = card.parts[part].build()
    return Denoiser(transformed(network, card.transforms), card.path, card.kind) if part == "denoiser" else network


def sketch(part: str, card: Card) -> nn.Module:
    """The network of one part without memory for its weights: every tensor is on the meta device."""
    with torch.device("meta"):
        return allocate(part, card)


def latent_shape_of(card: Card) -> tuple[int, int, int, int] | None:
    """`(C, F, h, w)` of the clips of a model that is not loaded; None without a codec."""
    if "codec" not in card.parts:
        return None
    with torch.device("meta"):
        codec = card.parts["codec"].build()
    return codec.latent_shape(card.num_frames, card.height, card.width)


def text_width_of(card: Card) -> int | None:
    """Width of the text states of a model that is not loaded; None without a text encoder."""
    if "text" not in card.parts:
        return None
    with torch.device("meta"):
        text: Any = card.parts["text"].build()
    return int(text.width)
