"""LoRA files of other tools: one safetensors file with `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

Layers are called as in diffusers (`transformer.blocks.0.attn1.to_q`), or by the names that a family's authors gave them,
which is what ComfyUI expects (`diffusion_model.blocks.0.self_attn.q`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.compress.linear import linears
from fewstep.core.yaml import load_json
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import CONFIG, PREFIX, WEIGHTS, LowRank
from fewstep.models.stored import open_tensors, read_tensors

Names = Literal["diffusers", "comfyui"]
NAMES: Mapping[Names, str] = MappingProxyType(
    {"diffusers": "pytorch_lora_weights.safetensors", "comfyui": "{}.safetensors"}
)
"""What a LoRA file is called, by who shall read it; diffusers looks for this name in a folder."""
_ENDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha")
_UNCALLABLE = re.compile(r"motion_modules\.\d+\.proj_(in|out)$")
"""Layers that diffusers calls with a keyword which peft's layers do not know: its pipelines fail with adapters there."""


def names_of(denoiser: Denoiser, names: Names) -> Callable[[str], str]:
    """What others call a parameter or layer of the backbone. ValueError where they have no other name for it."""
    backbone = denoiser.backbone
    if names == "diffusers":
        return backbone.foreign
    authors: Callable[[str], str] | None = getattr(backbone, "authors", None)
    if authors is None:
        raise ValueError(f"the names that ComfyUI expects are known for Wan, not for {type(backbone).__name__}")
    return authors


def require_adapter(folder: Path) -> Path:
    """The folder itself; FileNotFoundError where it has no adapters."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} is missing: only a run with settings.lora has adapters to export")
    return folder


def file_names(folders: Sequence[str], names: Names, stem: str) -> dict[str, str]:
    """What the LoRA of each of a model's networks is called, by the network's folder: the second's ends in `_2`."""
    first = Path(NAMES[names].format(stem))
    ends = ("", *(f"_{number}" for number in range(2, len(folders) + 1)))
    return {folder: f"{first.stem}{end}{first.suffix}" for folder, end in zip(folders, ends, strict=True)}


@torch.no_grad()
def write_lora(denoiser: Denoiser, adapter: Path, folder: Path, names: Names, stem: str) -> None:
    """The adapters in the folder `adapter`, as a file for each network; their strength `alpha / rank` is multiplied into B, so
    that no reader can miss it.

    ValueError where diffusers could not run with them.
    """
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    files = file_names(denoiser.backbone.folders, names, stem)  # type: ignore[arg-type]
    rename, prefix, usual = names_of(denoiser, names), _prefix(denoiser, names), next(iter(files))
    written: dict[str, dict[str, Tensor]] = {network: {} for network in files}
    for name, value in read_tensors(adapter / WEIGHTS).items():
        layer, end = _split(name.removeprefix(f"{PREFIX}backbone."))
        if _UNCALLABLE.search(layer):
            raise ValueError(
                f"diffusers fails with adapters on {layer}; export the merged student, or train with "
                "settings.lora.targets: [to_q, to_k, to_v, to_out.0]"
            )
        network, _, within = rename(layer).rpartition("/")
        scale = config["lora_alpha"] / config["r"] if end == "lora_B.weight" else 1.0
        written[network or usual][f"{prefix}{within}.{end}"] = (scale * value).contiguous()
    for network, tensors in written.items():
        save_file(tensors, folder / files[network], {"format": "pt"})


def read_lora(denoiser: Denoiser, source: Path) -> dict[str, LowRank]:
    """What a LoRA adds to the weights of the denoiser's layers, by their names here; every tensor of it must find its layer.

    `source` is a file with names as in diffusers, in ComfyUI or here, or a folder with one (also as peft writes it).
    FileNotFoundError or ValueError say what is wrong.
    """
    file, config = _find(source)
    tensors, strength = read_tensors(file), _strength(file, config)
    if not tensors:
        raise ValueError(
            f"{file}: there are no tensors in it; give a LoRA as a .safetensors file, or a folder with one"
        )
    layers, updates = _layers(denoiser), {}
    odd = sorted(name for name in tensors if _split(name)[0] not in layers or _split(name)[1] not in _ENDS)
    if odd:
        raise ValueError(
            f"{file}: {len(odd)} of {len(tensors)} tensors belong to no linear layer of this {type(denoiser.backbone).__name__}: "
            f"{', '.join(odd[:3])}"
        )
    for name in dict.fromkeys(_split(name)[0] for name in tensors):
        down, up = (_either(tensors, name, *ends) for ends in (("lora_A", "lora_down"), ("lora_B", "lora_up")))
        weight = denoiser.get_submodule(layers[name]).weight
        if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{file}: {name} is {tuple(up.shape)} times {tuple(down.shape)}, and the layer {tuple(weight.shape)}"
            )
        alpha = tensors.get(f"{name}.alpha")
        scale = strength if alpha is None else float(alpha) / down.shape[0]
        updates[layers[name]] = LowRank(up, down, scale)
    return updates


def _find(source: Path) -> tuple[Path, dict[str, Any]]:
    """The safetensors file, and peft's settings where they lie beside it."""
    if source.is_file():
        return source, {}
    if (source / CONFIG).is_file():
        return source / WEIGHTS, load_json(source / CONFIG, "a LoRA's settings")
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        found = f"there are {len(files)} .safetensors files in it" if source.is_dir() else "no such file or folder"
        raise FileNotFoundError(f"{source}: {found}; give a LoRA as a .safetensors file, or a folder with one")
    return files[0], {}


def _strength(file: Path, config: dict[str, Any]) -> float:
    """`alpha / rank` of tensors that have no alpha of their own."""
    if not config:
        with open_tensors(file) as opened:
            written = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        config = {key.rpartition(".")[2]: value for key, value in written.items()}
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora") if config.get(key)]
    if special:
        raise ValueError(f"{file}: LoRAs with {', '.join(special)} are not read; merge it with the tool that made it")
    return float(config["lora_alpha"] / config["r"]) if config else 1.0


def _layers(denoiser: Denoiser) -> dict[str, str]:
    """Linear layers by every name that a file may call them."""
    backbone, found = denoiser.backbone, dict[str, str]()
    outside = [(names_of(denoiser, names), _prefix(denoiser, names)) for names in _known(denoiser)]
    for name, *_ in linears(backbone):
        found |= {prefix + rename(name): f"backbone.{name}" for rename, prefix in outside}
        found[f"{PREFIX}backbone.{name}"] = f"backbone.{name}"
    return found


def _known(denoiser: Denoiser) -> list[Names]:
    """Whose names there are for this network."""
    names: list[Names] = ["diffusers"] if hasattr(denoiser.backbone, "folders") else []
    return [*names, "comfyui"] if hasattr(denoiser.backbone, "authors") else names


def _either(tensors: Mapping[str, Tensor], layer: str, *matrices: str) -> Tensor:
    for matrix in matrices:
        if f"{layer}.{matrix}.weight" in tensors:
            return tensors[f"{layer}.{matrix}.weight"]
    raise ValueError(f"{layer} has no {' or '.join(matrices)}; the file is incomplete")


def _prefix(denoiser: Denoiser, names: Names) -> str:
    return "diffusion_model." if names == "comfyui" else f"{denoiser.backbone.folders[0]}."  # type: ignore[index]


def _split(name: str) -> tuple[str, str]:
    """Layer, and which matrix of it."""
    end = next((end for end in _ENDS if name.endswith(f".{end}")), "")
    return name.removesuffix(f".{end}"), end
