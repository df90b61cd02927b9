"""Weights of other tools in their files: safetensors, or what torch pickles, of which nothing but tensors is read."""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.stored import open_tensors

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_INSIDE = ("generator_ema", "ema", "generator", "state_dict", "model", "module", "net")
"""Where a checkpoint may have the student's weights, the averaged ones first."""
_STUDENTS = ("generator_ema", "ema", "generator")
"""Of these, networks that were trained; of which one is meant where a system says so."""
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What torch puts into the names of a network that was sharded, checkpointed or compiled."""


class Weights(ABC):
    """Tensors by their names in the files, each read when it is asked for."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Every name."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""


@dataclass(frozen=True)
class _Files(Weights):
    places: Mapping[str, Path]

    @property
    def names(self) -> Collection[str]:
        return self.places.keys()

    def read(self, name: str) -> Tensor:
        tensor: Tensor = open_tensors(self.places[name]).get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Pickled(Weights):
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def files_in(source: Path) -> list[Path]:
    """The files of weights: a file itself; of a folder its safetensors files, or else its only pickled one.

    FileNotFoundError says that there are none.
    """
    if source.is_file():
        return [source]
    found = _in_folder(source)
    if not found or (found[0].suffix in PICKLED and len(found) > 1):
        said = f"there are {len(found)} files of weights in it" if source.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"{source}: {said}; give a file (.safetensors, {', '.join(PICKLED)}), or a folder with one"
        )
    return found


def _in_folder(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors")) or sorted(p for p in source.glob("*") if p.suffix in PICKLED)


def with_lora(source: Path, what: str, *, required: bool) -> tuple[Path, Path | None]:
    """The file of `what` in a folder, and the LoRA beside it. ValueError where there is more, or less."""
    every = [source] if source.is_file() else _in_folder(source)
    loras = [file for file in every if "lora" in file.name.lower()]
    rest = [file for file in every if file not in loras]
    if len(rest) != 1 or len(loras) > 1 or (required and not loras):
        count = "one" if required else "at most one"
        raise ValueError(f"{source}: give one file of {what}, and {count} LoRA beside it, in a folder")
    return rest[0], loras[0] if loras else None


def open_weights(source: Path, inside: str = "") -> Weights:
    """The weights in a file or folder; `inside` is the network that is meant where a checkpoint has several.

    FileNotFoundError, RecipeError or ValueError say what is wrong.
    """
    files = files_in(source)
    if files[0].suffix in PICKLED:
        return _Pickled(_unpickled(files[0], inside))
    places: dict[str, Path] = {}
    for file in files:
        for name in open_tensors(file).keys():  # noqa: SIM118 - it is no mapping
            if name in places:
                raise ValueError(
                    f"{source}: {name} is in {places[name].name} and in {file.name}; give one of these files"
                )
            places[name] = file
    return _require_some(_Files(places), source)


def _unpickled(path: Path, inside: str) -> Mapping[str, Tensor]:
    """ValueError for a file that is damaged, or holds anything but tensors: to load that would run its code."""
    try:
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise ValueError(f"{path} is cut short or no file of torch; copy or download it again") from None
        raise ValueError(
            f"{path} holds more than tensors, and loading that would run its code; ask its authors for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise ValueError(f"{path} is cut short or no file of torch; copy or download it again") from None
    found = _chosen(loaded, inside, path) if isinstance(loaded, dict) else {}
    return _require_some(_Pickled(_unwrapped(found, path)), path).tensors


def _chosen(loaded: Mapping[str, Any], inside: str, path: Path) -> Mapping[str, Any]:
    """The network that is meant in a checkpoint. ValueError where it is another one's."""
    networks = [key for key, value in loaded.items() if isinstance(value, dict)]
    order = (inside, *(key for key in _INSIDE if key not in _STUDENTS)) if inside else _INSIDE
    key = next((key for key in order if key in networks), None)
    if key is None and inside and set(networks) & set(_STUDENTS):
        raise ValueError(
            f"{path} has {', '.join(networks)}, and its authors sample {inside}, which is not in it; download the file that they "
            "sample"
        )
    return loaded if key is None else loaded[key]


def _unwrapped(found: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """Tensors by the names that they have in the network itself. ValueError where two have the same."""
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            plain = _WRAPPERS.sub("", str(name))
            if plain in tensors:
                raise ValueError(f"{path}: {plain} is in it twice, once wrapped; give a file with one of them")
            tensors[plain] = value
    return tensors


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # files of old versions of torch


def _require_some(weights: Any, source: Path) -> Any:
    if not weights.names:
        raise ValueError(f"{source}: there are no tensors in it; give the file of the denoiser's weights")
    return weights
