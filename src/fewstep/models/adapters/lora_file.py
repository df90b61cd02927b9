"""LoRA files as other tools write and read them: one safetensors file, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

Layers are called as in diffusers (`transformer.blocks.0.attn1.to_q`), or by the names that a family's authors gave them,
which is what ComfyUI expects (`diffusion_model.blocks.0.self_attn.q`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import CONFIG, PREFIX, WEIGHTS

Names = Literal["diffusers", "comfyui"]
NAMES: Mapping[Names, str] = MappingProxyType(
    {"diffusers": "pytorch_lora_weights.safetensors", "comfyui": "{}.safetensors"}
)
"""What a LoRA file is called, by who shall read it; diffusers looks for this name in a folder."""
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


@torch.no_grad()
def write_lora(denoiser: Denoiser, adapter: Path, file: Path, names: Names) -> None:
    """The adapters in the folder `adapter`; their strength `alpha / rank` is multiplied into B, so that no reader can miss it.

    FileNotFoundError where the folder has none, ValueError where diffusers could not run with them.
    """
    if not (adapter / CONFIG).is_file():
        raise FileNotFoundError(f"{adapter / CONFIG} is missing: only a run with settings.lora has adapters to export")
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    rename, prefix = names_of(denoiser, names), _prefix(denoiser, names)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(adapter / WEIGHTS).items():
        layer, end = _split(name.removeprefix(f"{PREFIX}backbone."))
        if _UNCALLABLE.search(layer):
            raise ValueError(
                f"diffusers fails with adapters on {layer}; export the merged student, or train with "
                "settings.lora.targets: [to_q, to_k, to_v, to_out.0]"
            )
        scale = config["lora_alpha"] / config["r"] if end == "lora_B.weight" else 1.0
        tensors[f"{prefix}{rename(layer)}.{end}"] = (scale * value).contiguous()
    save_file(tensors, file, {"format": "pt"})


def _prefix(denoiser: Denoiser, names: Names) -> str:
    return "diffusion_model." if names == "comfyui" else f"{denoiser.backbone.folders[0]}."  # type: ignore[index]


def _split(name: str) -> tuple[str, str]:
    """Layer, and which matrix of it."""
    layer, matrix, end = name.rsplit(".", 2)
    return layer, f"{matrix}.{end}"
