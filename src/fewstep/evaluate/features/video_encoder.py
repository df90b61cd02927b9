"""Features of clips from a video encoder of transformers, such as VideoMAE."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from fewstep.evaluate.inputs import as_read, fingerprint_folder

SETTINGS = "preprocessor_config.json"


class VideoEncoder:
    """Map clips `[B, 3, F, H, W]` in [-1, 1] to the mean `[B, D]` of a video encoder's last hidden states.

    `folder` was written by `save_pretrained` of the model and of its image processor: a network that reads `pixel_values`
    `[B, F, 3, H, W]` in [0, 1] before normalisation (VideoMAE, TimeSformer). The network's own settings give the number of
    frames, the size, and the mean and deviation of the pixels. ValueError for other folders.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        network = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval().to(device)
        config = network.config
        frames, side = getattr(config, "num_frames", None), getattr(config, "image_size", None)
        if network.main_input_name != "pixel_values" or frames is None or side is None:
            raise ValueError(
                f"{folder}: {type(network).__name__} is not a video encoder; give a folder with one, such as VideoMAE"
            )
        if not (folder / SETTINGS).is_file():
            raise ValueError(
                f"{folder} has no {SETTINGS}; save the model's image processor there too (save_pretrained)"
            )
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6) or settings.get("offset"):
            raise ValueError(f"{folder}: {SETTINGS} does not scale pixels to [0, 1]; use VideoMAE or TimeSformer")
        self._network, self._frames = network, int(frames)
        self._size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        self._mean, self._std = (
            torch.tensor(settings[key], device=device).reshape(3, 1, 1) for key in ("image_mean", "image_std")
        )
        size = "x".join(map(str, self._size))
        about = f"{type(network).__name__}, mean of the last states, {self._frames} frames of {size}"
        self.name = f"{folder.name} {fingerprint_folder(folder)} ({about})"

    def __call__(self, frames: Tensor) -> Tensor:
        pixels = as_read(frames, self._size, self._frames).transpose(1, 2)
        states = self._network(pixel_values=((pixels + 1) / 2 - self._mean) / self._std).last_hidden_state
        return states.mean(1)
