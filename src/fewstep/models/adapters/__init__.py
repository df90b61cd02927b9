"""Adapters for diffusers models, one file per family; each is imported only when a model needs it.

A family is a module with `card(layout) -> Card` and a `Backbone` that holds the modules of diffusers' own network. A part
that comes from there has `folders`, those of the layout it reads, and `load(folder)`, which takes its weights from them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.core import RecipeError
from fewstep.models.networks import ADAPTED, adapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fewstep.models.adapters.presets.facts import Preset
    from fewstep.models.bundle import VideoModel
    from fewstep.models.card import Card
    from fewstep.models.denoiser import Denoiser
    from fewstep.models.lora import Updates
    from fewstep.models.stored import Stored

PIPELINES = MappingProxyType(
    {
        "WanPipeline": "dits.wan", "WanImageToVideoPipeline": "dits.wan",
        "AnimateDiffPipeline": "unets.animatediff", "StableDiffusionPipeline": "unets.stable_diffusion",
        "LTXPipeline": "dits.ltx", "LTXConditionPipeline": "dits.ltx",
        "CogVideoXPipeline": "dits.cogvideox", "CogVideoXImageToVideoPipeline": "dits.cogvideox",
        "HunyuanVideoPipeline": "dits.hunyuan", "HunyuanVideo15Pipeline": "dits.hunyuan15",
    }
)  # fmt: skip
"""Diffusers' pipelines, as `model_index.json` names them, and the file of this room that makes their card."""


def is_layout(source: Path | str) -> bool:
    """Whether `source` is a folder in diffusers' layout, or may be the name of one on the hub."""
    path = Path(source)
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)) and not path.parent.exists()
    return bool(on_hub) or (path / "model_index.json").is_file()


def card(source: Path | str) -> Card:
    """What a model in diffusers' layout is, by its JSON files alone; of one that was exported here: its own card.

    RecipeError where no family reads it.
    """
    layout = adapter("layout").Layout.find(str(source))
    own: Card | None = adapter("export.exporting").stamped(layout)
    if own is not None:
        return own
    pipeline = layout.index["_class_name"]
    if pipeline not in PIPELINES:
        raise RecipeError(f"{source} is a {pipeline}; the pipelines that can be read are {', '.join(PIPELINES)}")
    made: Card = adapter(PIPELINES[pipeline]).card(layout)
    return replace(made, provenance=made.provenance | {"preset": NO_PRESET})


PRESETS = ("layout", "authors")
"""Other ways to sample a published model than its card's own."""
NO_PRESET = "none: Euler or DDIM over plain times, with the layout's shift; the presets layout and authors are others"
"""What the card of a layout says of how it is sampled."""
_AUTHORS = MappingProxyType({"Wan": "wan", "WanExperts": "wan", "LTX": "ltx", "CogVideoX": "cogvideox"})
"""Denoisers for which it is known how their authors sample them, and the file of `presets` that knows it."""


def preset(card: Card, name: str) -> Preset:
    """Another way to sample a model in diffusers' layout. RecipeError where there is none, or it cannot be followed."""
    if card.role == "student":
        raise RecipeError(
            f"preset: {name}: {card.name} is a student, which is sampled by its own contract; leave preset out"
        )
    layout, family = adapter("layout").Layout.find(card.sources["denoiser"]), card.parts["denoiser"].type
    if name == "layout":
        made: Preset = adapter("presets.scheduled").preset(layout)
    elif name in PRESETS and family in _AUTHORS:
        made = adapter(f"presets.{_AUTHORS[family]}").authors(layout, card)
    else:
        raise RecipeError(
            f"preset: {name}: there is none for {family}; choose layout, or authors for {', '.join(_AUTHORS)}, or leave it out"
        )
    return made


def at_size(card: Card) -> Card:
    """The card of a model in diffusers' layout, with what follows from its size and frame rate."""
    family = adapter(ADAPTED[card.parts["denoiser"].type])
    return family.at_size(card) if hasattr(family, "at_size") else card


def load(part: nn.Module, source: str) -> None:
    """Give a part of the meta device its weights."""
    _network(part, source).load(_layout(part, source).folder)


def stored(part: nn.Module, source: str) -> Stored | None:
    """The weights of a part in their files; None if the files name them differently."""
    found: Stored | None = _layout(part, source).stored(part)
    return found


def files_of(part: nn.Module, source: str) -> list[tuple[str | int, ...]]:
    """What tells the files of a part from others, without reading or downloading them: on the hub the commit, else each file's
    name, size and time of change.
    """
    network = _network(part, source)
    layout: Any = adapter("layout").Layout.find(source)
    if not Path(source).expanduser().is_dir():
        return [(source, layout.folder.name)]
    paths = sorted(path for folder in network.folders for path in (layout.folder / folder).glob("*"))
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _layout(part: nn.Module, source: str) -> Any:
    return adapter("layout").Layout.find(source, _network(part, source).folders)


def _network(part: nn.Module, source: str) -> Any:
    """The network of a part that reads folders of diffusers; RecipeError for fewstep's own."""
    network = getattr(part, "backbone", part)
    if not hasattr(network, "folders"):
        raise RecipeError(
            f"the card takes the weights of {type(network).__name__} from {source}, and it is fewstep's own; "
            "take it out of the card's `sources`"
        )
    return network


def export_model(model: VideoModel, folder: Path, **options: Any) -> Path:
    """See `VideoModel.export`, whose options these are."""
    made: Path = adapter("export.exporting").export(model, folder, **options)
    return made


def export_lora(model: VideoModel, lora: Path, folder: Path, **options: Any) -> Path:
    """Write a student's adapters, which lie in the folder `lora`, as a LoRA file that diffusers or ComfyUI reads.

    Options: `names`, `dtype` and `recipe`, as of `VideoModel.export`.
    """
    made: Path = adapter("export.exporting").export_lora(model, lora, folder, **options)
    return made


def read_lora(denoiser: Denoiser, source: str) -> Updates:
    """What a LoRA adds to the weights of a denoiser: a file or folder, or its name on the hub."""
    updates: Updates = adapter("lora_reading").read_lora(denoiser, source)
    return updates


def lora_of(denoiser: Denoiser, tensors: Mapping[str, Tensor], path: Path) -> Updates:
    """What the tensors of a LoRA's file at `path` add to a denoiser; `alpha / rank` is 1 where they do not say it."""
    updates: Updates = adapter("lora_reading").lora_of(denoiser, tensors, path)
    return updates


def is_lora(source: str) -> bool:
    """Whether a LoRA lies there, or may be on the hub."""
    return Path(source).exists() or bool(adapter("lora_hub").is_hub_name(source))
