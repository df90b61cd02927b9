"""Removed blocks: a network with fewer blocks, which must be trained to compensate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fewstep.compress.stepwise import StepBlock
from fewstep.compress.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Pruned(Transform):
    """Some blocks are left out. Blocks of one kind only: those of a U-Net need each other."""

    blocks: tuple[int, ...] = ()
    """Numbers of the blocks to remove, counted in the whole network from 0."""

    @property
    def identity(self) -> bool:
        return not self.blocks

    def apply(self, network: Any) -> Any:
        if self.blocks and network.flow_head is not None:
            raise ValueError("the last blocks of this network are its flow head; put Pruned before FlowHead")
        count = len(network.blocks)
        if len(set(self.blocks)) != len(self.blocks) or not all(0 <= index < count for index in self.blocks):
            raise ValueError(f"blocks must be different numbers from 0 to {count - 1}, got {list(self.blocks)}")
        if self.blocks and len(self.blocks) == count:
            raise ValueError(f"all {count} blocks would be left out; leave some in")
        if len({type(block.inner if isinstance(block, StepBlock) else block) for block in network.blocks}) > 1:
            raise ValueError(f"the blocks of a {type(network).__name__} are not of one kind, so none can be left out")
        network.blocks = nn.ModuleList(block for i, block in enumerate(network.blocks) if i not in self.blocks)
        return network

    def fit(self, network: Any, statistics: Mapping[str, Tensor]) -> Pruned:
        """As many blocks as `blocks` has, chosen anew: those that change what they read the least, which is what `statistics`
        has under `blocks.0`, `blocks.1`, ..."""
        changes = [float(statistics[f"blocks.{index}"]) for index in range(len(network.blocks))]
        least = sorted(range(len(changes)), key=changes.__getitem__)[: len(self.blocks)]
        return replace(self, blocks=tuple(sorted(least)))
