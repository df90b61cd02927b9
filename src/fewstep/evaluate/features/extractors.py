"""Feature maps of clips for the Frechet distance, by name or by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.evaluate.inputs import as_read, fingerprint_files, require_transformers
from fewstep.metrics import pooled
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.fingerprint import fingerprint

I3D_FLAGS = {"rescale": False, "resize": False, "return_features": True}
"""Arguments of the usual TorchScript I3D: its input has the right size and lies in [-1, 1]; return features, not logits."""
I3D_FRAMES, I3D_SIZE = 16, (224, 224)


@dataclass(frozen=True)
class FeatureMap:
    """The features of the Frechet distance: clips `[B, 3, F, H, W]` to features `[B, D]`, with a name that identifies them."""

    name: str
    map: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def check(self, num_frames: int, size: tuple[int, int], device: torch.device) -> None:
        """Try it on two grey clips, so that a ValueError comes now and not after an hour of sampling."""
        features = self.map(torch.zeros(2, 3, num_frames, *size, device=device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{self.name} gives {got} for two clips, and must give [2, D]; give another feature extractor"
            )


def feature_map(source: str, size: tuple[int, int], device: torch.device) -> FeatureMap:
    """The feature map that `source` names; its own name says exactly what was loaded.

    `pooled`: fixed means, no network. `auto`: the built-in world's network if it fits clips of `size` (height, width), else
    `pooled`. A TorchScript file, called like I3D: **loading it runs code in the file**, so it is loaded only if you name its
    path. A folder with a video encoder such as VideoMAE, written by transformers' `save_pretrained`. A folder or built-in
    model with a `features` network of fewstep. Clips are scaled to the extractor's size (`as_read`).
    """
    if source == "pooled":
        return FeatureMap("pooled (72 fixed means, no network)", pooled)
    if source == "auto":
        try:
            card = read_card("world/features")
        except FileNotFoundError:
            return feature_map("pooled", size, device)
        source = "world/features" if (card.height, card.width) == size else "pooled"
        return feature_map(source, size, device)
    if Path(source).suffix and not Path(source).exists():
        raise FileNotFoundError(
            f"{source}: no such file or folder; give a TorchScript file, a folder with a feature network, `pooled` or `auto`"
        )
    if Path(source).is_file():
        return _torchscript(Path(source), device)
    if (Path(source) / "config.json").is_file():
        require_transformers(source)
        from fewstep.evaluate.features.video_encoder import VideoEncoder

        encoder = VideoEncoder(Path(source), device)
        return FeatureMap(encoder.name, encoder)
    model = VideoModel.from_pretrained(source)
    network, own = model.part("features").to(device), (model.card.height, model.card.width)
    return FeatureMap(f"{source} {fingerprint(network)}", lambda frames: network(as_read(frames, own)))


def _torchscript(path: Path, device: torch.device) -> FeatureMap:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a TorchScript file ({str(error).splitlines()[0]}); give i3d_torchscript.pt, another extractor "
            "saved by torch.jit.save, or a folder"
        ) from None
    known = {argument.name for argument in network.forward.schema.arguments}
    flags = {name: value for name, value in I3D_FLAGS.items() if name in known}
    called = "".join(f", {name}={value}" for name, value in flags.items())
    size = "x".join(map(str, I3D_SIZE))
    name = f"{path.name} {fingerprint_files([path])} (TorchScript, {I3D_FRAMES} frames of {size}{called})"
    return FeatureMap(name, lambda frames: network(as_read(frames, I3D_SIZE, I3D_FRAMES), **flags))
