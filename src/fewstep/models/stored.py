"""Weights that stay in their safetensors files until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from safetensors import safe_open
from torch import Tensor, nn

from fewstep.core import RecipeError


class Stored(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, each read when it is asked for, in the dtype of its namesake in `like`.

    `names` are those in the files, by those in `like`, where they differ: with the file's folder and a `/` in front where
    several folders may have the same. FileNotFoundError names a file that is missing.
    """

    def __init__(
        self, paths: Sequence[Path], like: Mapping[str, Tensor], names: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; the folder is incomplete, copy it again")
        self._like, mine = like, {names.get(name, name): name for name in like}
        self._place = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                self._place[mine.get(f"{path.parent.name}/{name}", mine.get(name, name))] = (file, name)

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._place[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor.to(self._like[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, without reading it."""
        return {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._place.items()}

    def odd(self, network: nn.Module) -> list[str]:
        """Names that only one of the files and `network` has, and those whose shapes differ."""
        stored, own = self.shapes(), {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return sorted(own.keys() ^ stored.keys()) + [n for n in own if n in stored and own[n] != stored[n]]

    def require_matching(self, network: nn.Module, where: Path) -> None:
        """RecipeError names the first tensors that do not fit `network`."""
        if odd := self.odd(network):
            raise RecipeError(f"{where}: tensors do not match the card's network: {', '.join(odd[:4])}")
