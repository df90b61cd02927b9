"""Write LoRA files for other tools: one safetensors file with `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

Layers are called as in diffusers (`transformer.blocks.0.attn1.to_q`), or by the names that a family's authors gave them,
which is what ComfyUI expects (`diffusion_model.blocks.0.self_attn.q`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import CONFIG, PREFIX, WEIGHTS
from fewstep.models.stored import read_tensors

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
def write_lora(
    denoiser: Denoiser, adapter: Path, folder: Path, names: Names, stem: str, dtype: torch.dtype = torch.float32
) -> None:
    """The adapters in the folder `adapter`, as a file of `dtype` for each network; their strength `alpha / rank` is multiplied
    into B, so that no reader can miss it.

    ValueError where diffusers could not run with them.
    """
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    files = file_names(denoiser.backbone.folders, names, stem)  # type: ignore[arg-type]
    rename, prefix, usual = names_of(denoiser, names), _prefix(denoiser, names), next(iter(files))
    written: dict[str, dict[str, Tensor]] = {network: {} for network in files}
    for name, value in read_tensors(adapter / WEIGHTS).items():
        layer, end = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", name.removeprefix(f"{PREFIX}backbone.")).groups()  # type: ignore[union-attr]
        if _UNCALLABLE.search(layer):
            raise ValueError(
                f"diffusers fails with adapters on {layer}; export the merged student, or train with "
                "settings.lora.targets: [to_q, to_k, to_v, to_out.0]"
            )
        network, _, within = rename(layer).rpartition("/")
        scale = config["lora_alpha"] / config["r"] if end == "lora_B.weight" else 1.0
        written[network or usual][f"{prefix}{within}.{end}"] = (scale * value).to(dtype).contiguous()
    for network, tensors in written.items():
        save_file(tensors, folder / files[network], {"format": "pt"})


def _prefix(denoiser: Denoiser, names: Names) -> str:
    return "diffusion_model." if names == "comfyui" else f"{denoiser.backbone.folders[0]}."  # type: ignore[index]
