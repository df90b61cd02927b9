"""A model in diffusers' folder layout: `model_index.json`, and a folder for each of its networks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from fewstep.models.denoiser import Denoiser
from fewstep.models.stored import KINDS, Stored, open_tensors


@dataclass(frozen=True)
class Layout:
    """Where it lies and what it says of itself."""

    source: str
    """Hub name or absolute path."""
    folder: Path
    index: dict[str, Any]
    """Content of `model_index.json`."""

    @classmethod
    def find(cls, source: str, folders: Sequence[str] = ()) -> Layout:
        """The layout in a folder, or on the hub: then its JSON files and all of `folders` are downloaded, unless they are
        here already. FileNotFoundError says what is not there."""
        folder = Path(source).expanduser()
        if folder.is_dir():
            source, folder = str(folder.resolve()), folder.resolve()
        elif folder.is_absolute():
            raise FileNotFoundError(
                f"{source}: no such folder; if it was moved, correct `sources` in the student's card.json"
            )
        else:
            folder = _download(source, folders)
        return cls(source, folder, _read(folder / "model_index.json"))

    def config(self, part: str) -> dict[str, Any]:
        """Constructor arguments in `part/config.json`."""
        return _arguments(self.folder / part / "config.json")

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's settings."""
        return _arguments(self.folder / "scheduler" / "scheduler_config.json")

    def guider(self) -> dict[str, Any]:
        """The settings of its guidance, where it has such a folder."""
        return _arguments(self.folder / "guider" / "guider_config.json")

    def dtype(self, part: str) -> torch.dtype | None:
        """The type of most numbers in the files of `part/`; None where there are none."""
        numbers = Counter[str]()
        for file in _weight_files(self.folder / part):
            if file.is_file():
                tensors = open_tensors(file)
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    piece = tensors.get_slice(name)
                    numbers[piece.get_dtype()] += math.prod(piece.get_shape())
        types = {kind: dtype for dtype, kind in KINDS.items() if dtype.is_floating_point}
        return next((types[kind] for kind, _ in numbers.most_common() if kind in types), None)

    def stored(self, part: nn.Module) -> Stored | None:
        """Weights of a part in their files; None where their names are not the part's own, or the part needs more."""
        network: Any = part.backbone if isinstance(part, Denoiser) else part
        own, names, folders = part.state_dict(), {}, network.folders[:1]
        if isinstance(part, Denoiser):
            names = {name: network.foreign(name.removeprefix("backbone.")) for name in own}
            folders = network.folders
        stored = Stored([file for folder in folders for file in _weight_files(self.folder / folder)], own, names)
        whole = not any(module._non_persistent_buffers_set for module in part.modules())
        return stored if whole and not stored.odd(part) else None

    def weights(self, part: str, like: Mapping[str, Tensor], names: Mapping[str, str] = MappingProxyType({})) -> Stored:
        """What the files of `part/` hold, in the dtypes of `like`; `names` are theirs by those of `like`."""
        return Stored(_weight_files(self.folder / part), like, names)


def _download(source: str, folders: Sequence[str]) -> Path:
    wanted = ["*.json", "*/*.json", *(f"{folder}/*" for folder in folders)]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*.bin", "*.msgpack", "*.onnx*"]))
    except Exception as error:  # its own errors and those of the network have no class in common
        raise FileNotFoundError(f"{source}: there is no such folder, and the hub did not give it: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return [folder / name for name in sorted(set(_read(index)["weight_map"].values()))]
    diffusers, transformers = folder / "diffusion_pytorch_model.safetensors", folder / "model.safetensors"
    return [transformers if transformers.is_file() else diffusers]


def _arguments(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _read(path).items() if not key.startswith("_")}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the model's folder is incomplete, copy or download it again")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
