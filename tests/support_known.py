"""What tests of known students share: LoRA files with alphas, and the noise that clips begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core import Rng, Seeds
from fewstep.models import VideoModel

RANK, ALPHA = 4, 0.5
"""Their quotient is 1/8, as in the first files of Wan2.2-Lightning."""


def lora(path: Path, layers: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """A LoRA over `layers` with alphas; what it adds by layer."""
    tensors, updates = {}, {}
    for number, (layer, (out, into)) in enumerate(layers.items()):
        down, up = Rng(seed).randn((RANK, into), f"down{number}"), Rng(seed).randn((out, RANK), f"up{number}")
        tensors |= {
            f"{layer}.lora_down.weight": down,
            f"{layer}.lora_up.weight": up,
            f"{layer}.alpha": torch.tensor(ALPHA),
        }
        updates[layer] = ALPHA / RANK * up @ down
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return updates


def start_of(student: VideoModel) -> Tensor:
    return Seeds((5, 6)).randn((2, *student.latent_shape()), "start")
