"""Adapters for diffusers models, one file per family; each is imported only when a model needs it.

A family is a module with `card(layout) -> Card` and a `Backbone` that holds the modules of diffusers' own network. A part
that comes from there has `folders`, those of the layout it reads, and `load(folder)`, which takes its weights from them.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from torch import nn

from fewstep.core import RecipeError

if TYPE_CHECKING:
    from fewstep.models.bundle import Card, VideoModel
    from fewstep.models.denoiser import Denoiser
    from fewstep.models.lora import LowRank
    from fewstep.models.stored import Stored

PIPELINES = MappingProxyType(
    {
        "WanPipeline": "wan", "WanImageToVideoPipeline": "wan",
        "AnimateDiffPipeline": "animatediff", "StableDiffusionPipeline": "stable_diffusion",
        "LTXPipeline": "ltx", "LTXConditionPipeline": "ltx",
        "CogVideoXPipeline": "cogvideox", "CogVideoXImageToVideoPipeline": "cogvideox",
        "HunyuanVideoPipeline": "hunyuan", "HunyuanVideo15Pipeline": "hunyuan15",
    }
)  # fmt: skip
"""Diffusers' pipelines, as `model_index.json` names them, and the file here that makes their card."""
PARTS = MappingProxyType(
    {
        "Wan": "wan", "WanExperts": "wan_experts", "WanImage": "wan_image", "T5Text": "t5", "VideoCodec": "codec",
        "AnimateDiff": "animatediff", "StableDiffusion": "stable_diffusion", "ClipText": "clip", "FrameCodec": "frame_codec",
        "LTX": "ltx", "CogVideoX": "cogvideox", "CogVideoXImage": "cogvideox_image",
        "HunyuanVideo": "hunyuan", "HunyuanText": "hunyuan_text",
        "HunyuanVideo15": "hunyuan15", "QwenByT5Text": "qwen_byt5",
    }
)  # fmt: skip
"""Networks a card may name, and the file each is in."""


def part_class(name: str) -> type[nn.Module]:
    """The class of one of `PARTS`."""
    found: type[nn.Module] = getattr(_module(PARTS[name]), name)
    return found


def is_layout(source: Path | str) -> bool:
    """Whether `source` is a folder in diffusers' layout, or may be the name of one on the hub."""
    path = Path(source)
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)) and not path.parent.exists()
    return bool(on_hub) or (path / "model_index.json").is_file()


def card(source: Path | str) -> Card:
    """What a model in diffusers' layout is, by its JSON files alone; of one that was exported here: its own card.

    RecipeError where no family reads it.
    """
    layout = _module("layout").Layout.find(str(source))
    own: Card | None = _module("exporting").stamped(layout)
    if own is not None:
        return own
    pipeline = layout.index["_class_name"]
    if pipeline not in PIPELINES:
        raise RecipeError(f"{source} is a {pipeline}; the pipelines that can be read are {', '.join(PIPELINES)}")
    made: Card = _module(PIPELINES[pipeline]).card(layout)
    return made


def at_size(card: Card) -> Card:
    """The card of a model in diffusers' layout, with what follows from its size and frame rate."""
    family = _module(PARTS[card.parts["denoiser"].type])
    return family.at_size(card) if hasattr(family, "at_size") else card


def load(part: nn.Module, source: str, *, leave: bool = False) -> Stored | None:
    """Give a part of the meta device its weights; with `leave` return them in their files instead, if names allow."""
    network = getattr(part, "backbone", part)
    if not hasattr(network, "folders"):
        raise RecipeError(
            f"the card takes the weights of {type(network).__name__} from {source}, and it is fewstep's own; "
            "take it out of the card's `sources`"
        )
    layout = _module("layout").Layout.find(source, network.folders)
    stored: Stored | None = layout.stored(part) if leave else None
    if stored is None:
        network.load(layout.folder)
    return stored


def export(model: VideoModel, folder: Path, *, names: str, link: bool, recipe: str = "") -> Path:
    """See `VideoModel.export`."""
    made: Path = _module("exporting").export(model, folder, names=names, link=link, recipe=recipe)
    return made


def export_lora(model: VideoModel, adapter: Path, folder: Path, *, names: str, recipe: str = "") -> Path:
    """Write a student's adapters, which lie in the folder `adapter`, as a LoRA file that diffusers or ComfyUI reads."""
    made: Path = _module("exporting").export_lora(model, adapter, folder, names=names, recipe=recipe)
    return made


def read_lora(denoiser: Denoiser, source: Path) -> dict[str, LowRank]:
    """What a LoRA file or folder adds to the weights of a denoiser, by layer."""
    updates: dict[str, LowRank] = _module("lora_file").read_lora(denoiser, source)
    return updates


def _module(name: str) -> ModuleType:
    """A file of this room. RecipeError says what to install."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"models of the diffusers ecosystem need {error.name}: pip install 'fewstep[diffusers]'"
        ) from error
