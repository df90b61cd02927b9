"""Weights that stay in their safetensors files until they are needed, and their checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.core import RecipeError
from fewstep.core.env import place
from fewstep.core.stamp import stamp_of

KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Types of numbers as safetensors calls them."""


def open_tensors(path: Path) -> Any:
    """A safetensors file. FileNotFoundError or RecipeError name one that is missing or damaged, and what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder is incomplete, copy it again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RecipeError(f"{path} is cut short or no safetensors file ({error}); copy or download it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Errors as of `open_tensors`."""
    file = open_tensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def write_tensors(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """A safetensors file of what `read` gives for each name, with the shapes and dtypes of `like`: one tensor at a time, so a
    network that is computed while it is written (`lora.Merged`) is never in memory as a whole.
    """
    header, end = dict[str, Any](), 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in like.items():
            value = read(name).detach().to("cpu", tensor.dtype).contiguous()
            file.write(value.flatten().view(torch.uint8).numpy().data)


class Stored(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, each read when it is asked for, in the dtype of its namesake in `like`.

    `names` are those in the files, by those in `like`, where they differ: with the file's folder and a `/` in front where
    several folders may have the same. Files with one of the `stamps` are compared with it before the first tensor is read:
    RecipeError names one that is not as it was written. FileNotFoundError names a file that is missing.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        like: Mapping[str, Tensor],
        names: Mapping[str, str] = MappingProxyType({}),
        stamps: Mapping[Path, str] = MappingProxyType({}),
    ) -> None:
        self._unchecked = dict(stamps) if place().local_rank == 0 else {}  # once per machine
        self._like, mine = like, {names.get(name, name): name for name in like}
        self._place = {}
        for path in paths:
            file = open_tensors(path)
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                self._place[mine.get(f"{path.parent.name}/{name}", mine.get(name, name))] = (path, name)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, self._like[name].dtype)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as `dtype`: memory of its own, for as much as that takes."""
        while self._unchecked:
            path, stamp = self._unchecked.popitem()
            if stamp_of(path) != stamp:
                raise RecipeError(
                    f"{path} is not as it was written: some of its bytes have changed. Copy it again from where it came; "
                    "to use it all the same, trust it (--trust, or trust=True)"
                )
        path, stored = self._place[name]
        # The file is opened anew: an open one keeps in memory what was read.
        tensor: Tensor = open_tensors(path).get_tensor(stored)
        return tensor.to(dtype, copy=True)  # the file may be written over, or deleted

    def __contains__(self, name: object) -> bool:
        return name in self._place  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading the tensor."""
        return {name: tuple(piece.get_shape()) for name, piece in self.slices()}

    def odd(self, network: nn.Module) -> list[str]:
        """Names that only one of the files and `network` has, and those whose shapes differ."""
        stored, own = self.shapes(), {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return sorted(own.keys() ^ stored.keys()) + [n for n in own if n in stored and own[n] != stored[n]]

    def require_matching(self, network: nn.Module, where: Path) -> None:
        """RecipeError names the first tensors that do not fit `network`."""
        if odd := self.odd(network):
            raise RecipeError(f"{where}: tensors do not match the card's network: {', '.join(odd[:4])}")
        for name, piece in self.slices():
            kind = piece.get_dtype()
            if self._like[name].is_floating_point() and "F" not in kind:
                raise RecipeError(
                    f"{where}: {name} is stored as {kind}, and the network has numbers; copy the folder again"
                )

    def slices(self) -> Iterator[tuple[str, Any]]:
        """Every tensor as it is described in its file."""
        files = {path: open_tensors(path) for path, _ in self._place.values()}
        return ((name, files[path].get_slice(stored)) for name, (path, stored) in self._place.items())
