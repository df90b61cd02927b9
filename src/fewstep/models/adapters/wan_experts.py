"""Wan 2.2 A14B (2503.20314 and its code release): one Wan for the noisy times, another for the rest.

Experts take turns in time, so a batch is routed sample by sample: block i of all experts is one block here, and each sees
the samples that are its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fewstep.attention import KVView, Ulysses
from fewstep.core.types import Cond
from fewstep.models.adapters.wan import Wan
from fewstep.models.backbone import Backbone, Original, State, Tokens


@dataclass(frozen=True)
class Routed(State):
    """The states of all experts."""

    parts: tuple[Tokens | None, ...]
    """By expert, each of its own samples; None where there are none."""
    order: Tensor
    """Where each sample of the batch is in the parts put together, `[B]`."""

    @property
    def volume(self) -> Tensor:
        return self.together(part.volume for part in self.parts if part)

    @property
    def detached(self) -> Routed:
        return self._each(lambda part: part.detached)

    def split(self, processes: Ulysses) -> Routed:
        return self._each(lambda part: part.split(processes))

    @property
    def joined(self) -> Routed:
        return self._each(lambda part: part.joined)

    def together(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor of the batch from those of the parts that are there."""
        return torch.cat(list(tensors))[self.order]

    def _each(self, change: Callable[[Tokens], Tokens]) -> Routed:
        return replace(self, parts=tuple(part and change(part) for part in self.parts))


class WanExperts(Backbone):
    """Expert 0 is for times from `boundaries[0]` to 1, expert 1 for those from `boundaries[1]` to there, the last from 0.

    All have the same `config`, that of diffusers. The frames of a clip must have times of one expert. There is no cache: an
    expert cannot read the keys of another.
    """

    shares = True
    folders: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def __init__(self, *, config: dict[str, Any], boundaries: list[float]) -> None:
        super().__init__()
        if len(boundaries) != len(self.folders) - 1 or not 0 < boundaries[0] < 1:
            raise ValueError(f"two experts have one boundary between 0 and 1, got {boundaries}")
        self.args = {"config": config, "boundaries": list(boundaries)}
        self.boundaries = tuple(boundaries)
        self._hold([Wan(config=config) for _ in self.folders])

    def load(self, folder: Path) -> None:
        """Take the weights of a folder in diffusers' layout, as float32."""
        with torch.device("meta"):
            experts = [Wan(config=self.args["config"]) for _ in self.folders]  # type: ignore[arg-type]
        for expert, part in zip(experts, self.folders, strict=True):
            expert.load(folder, part)
        self._hold(experts)

    def _hold(self, experts: list[Wan]) -> None:
        self.width = experts[0].width
        columns = [list(expert.blocks) for expert in experts]
        self.blocks = nn.ModuleList(Block(row) for row in zip(*columns, strict=True))
        for expert in experts:
            expert.blocks = nn.ModuleList()
        self.experts = nn.ModuleList(experts)

    def expert(self, index: int) -> Wan:
        """One expert as a network of its own, around the same tensors."""
        alone: Wan = copy.copy(self.experts[index])  # type: ignore[assignment]
        blocks = nn.ModuleList(block.experts[index] for block in self.blocks)  # type: ignore[union-attr, index, misc]
        alone._modules = {**alone._modules, "blocks": blocks}
        return alone

    def embed(self, x: Tensor, t: Tensor, cond: Cond, kv: KVView | None = None) -> Routed:
        if kv is not None:
            raise ValueError("experts have no cache: one cannot read the keys of another; make whole clips")
        chosen, parts, order = self._chosen(t), [], []
        for index, expert in enumerate(self.experts):
            own = [row for row, its in enumerate(chosen) if its == index]
            rows = torch.tensor(own, device=x.device, dtype=torch.long)
            parts.append(expert.embed(x[rows], t[rows], cond[rows]) if own else None)  # type: ignore[operator]
            order += own
        places = sorted(range(len(order)), key=order.__getitem__)
        state = Routed(tuple(parts), torch.tensor(places, device=x.device))
        return _reaching_idle(self.experts, state)

    def head(self, state: Routed) -> Tensor:
        experts = zip(self.experts, state.parts, strict=True)
        return state.together(expert.head(part) for expert, part in experts if part)  # type: ignore[operator]

    def original(self) -> Original:
        networks = {folder: self.expert(i).original().networks["transformer"] for i, folder in enumerate(self.folders)}

        def forward(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            made = []
            for row, index in enumerate(self._chosen(t)):
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

    def _chosen(self, t: Tensor) -> list[int]:
        """The expert of each sample. ValueError where one would need several."""
        if isinstance(t, FakeTensor):  # a run planned in shapes: either expert costs the same
            return [0] * len(t)
        frames = t if t.ndim == 2 else t[:, None]
        index = torch.stack([frames < boundary for boundary in self.boundaries]).sum(0)
        if not (index == index[:, :1]).all():
            raise ValueError(f"the frames of a clip must have times of one expert, on one side of {self.boundaries}")
        chosen: list[int] = index[:, 0].tolist()
        return chosen


class Block(nn.Module):
    """The same block of every expert."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, state: Routed) -> Routed:
        parts = zip(self.experts, state.parts, strict=True)
        return _reaching_idle(
            self.experts, replace(state, parts=tuple(part and expert(part) for expert, part in parts))
        )


def _reaching_idle(experts: nn.ModuleList, state: Routed) -> Routed:
    """The same state, from which a gradient of zero reaches the experts without samples.

    Processes that train together must have gradients of the same parameters, whatever times each of them has drawn.
    """
    idle = [expert for expert, part in zip(experts, state.parts, strict=True) if part is None]
    trained = [p for expert in idle for p in expert.parameters() if p.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return state
    nothing = 0 * torch.stack([p.flatten()[0] for p in trained]).sum()
    return replace(state, parts=tuple(part and replace(part, x_BNE=part.x_BNE + nothing) for part in state.parts))
