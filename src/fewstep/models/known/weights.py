"""Weights of other tools in their files: safetensors, or what torch pickles, of which nothing but tensors is read."""

from __future__ import annotations

import pickle
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
    found = sorted(source.glob("*.safetensors")) or sorted(p for p in source.glob("*") if p.suffix in PICKLED)
    if not found or (found[0].suffix in PICKLED and len(found) > 1):
        said = f"there are {len(found)} files of weights in it" if source.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"{source}: {said}; give a file (.safetensors, {', '.join(PICKLED)}), or a folder with one"
        )
    return found


def open_weights(source: Path) -> Weights:
    """The weights in a file or folder. FileNotFoundError, RecipeError or ValueError say what is wrong."""
    files = files_in(source)
    if files[0].suffix in PICKLED:
        return _Pickled(_unpickled(files[0]))
    places: dict[str, Path] = {}
    for file in files:
        for name in open_tensors(file).keys():  # noqa: SIM118 - it is no mapping
            if name in places:
                raise ValueError(
                    f"{source}: {name} is in {places[name].name} and in {file.name}; give one of these files"
                )
            places[name] = file
    return _require_some(_Files(places), source)


def _unpickled(path: Path) -> Mapping[str, Tensor]:
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
    for key in _INSIDE:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    return _require_some(_Pickled(tensors), path).tensors


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
