"""Wan 2.2 A14B (2503.20314 and its code release): one Wan for noisy times, another for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.attention import Dense, Pattern
from fewstep.core import Cond
from fewstep.models.adapters.dits.wan import Wan
from fewstep.models.backbone import Backbone, Original
from fewstep.models.experts import Experts


class WanExperts(Experts[Wan]):
    """Two networks with the same `config`, that of diffusers, and one boundary. See `Experts`."""

    folders: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def __init__(self, *, config: dict[str, Any], boundaries: list[float], pattern: Pattern = Dense()) -> None:
        if len(boundaries) != len(self.folders) - 1 or not 0 < boundaries[0] < 1:
            raise ValueError(f"two experts have one boundary between 0 and 1, got {boundaries}")
        super().__init__([Wan(config=config, pattern=pattern) for _ in self.folders], boundaries)
        self.args = {"config": config, "boundaries": list(boundaries), "pattern": pattern.tree()}

    @property
    def named(self) -> Backbone:
        return self

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        with torch.device("meta"):
            experts = [Wan(config=self.args["config"], pattern=self.pattern) for _ in self.folders]  # type: ignore[arg-type]
        for expert, part in zip(experts, self.folders, strict=True):
            expert.load(folder, part)
        self.hold(experts)

    def original(self) -> Original:
        self.require_plain()
        networks = {folder: self.expert(i).original().networks["transformer"] for i, folder in enumerate(self.folders)}

        def forward(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            made = []
            for row, (index,) in enumerate(self._chosen(t)):
                one, network = slice(row, row + 1), networks[self.folders[index]]
                made.append(self.expert(index).by_original(network, x[one], t[one], cond[one]))
            return torch.cat(made)

        return Original(networks, forward)

    def foreign(self, name: str) -> str:
        """`folder/name`, because the experts' files are apart."""
        before, _, rest = name.partition("experts.")
        index, _, rest = rest.partition(".")
        return f"{self.folders[int(index)]}/{before}{rest}"

    def authors(self, name: str) -> str:
        """What Wan's authors call it, after the folder of its expert."""
        folder, _, rest = self.foreign(name).partition("/")
        return f"{folder}/{Wan.authors(rest)}"
