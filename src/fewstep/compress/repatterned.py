"""Another attention pattern: the blocks of a network read other keys than those that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fewstep.attention import Operation, Pattern
from fewstep.compress.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Repatterned(Transform):
    """Self-attention follows another pattern. What the pattern learns is new."""

    pattern: Pattern

    @property
    def identity(self) -> bool:
        return False

    def apply(self, network: Any) -> Any:
        return follow(network, self.pattern)


def follow(backbone: Any, pattern: Pattern) -> Any:
    """Let every block of a backbone do what `pattern` says, in place. ValueError where attention takes no pattern."""
    hosts = [(layer, host) for layer, block in enumerate(backbone.blocks) for host in block.modules() if _reads(host)]
    if not hosts:
        raise ValueError(
            f"the attention of a {type(backbone).__name__} takes no pattern; take a transformer of the list"
        )
    weight = next(backbone.parameters())
    for layer, host in hosts:
        operation = pattern.operation(layer, backbone.heads, backbone.width // backbone.heads)
        host.operation = operation.to(weight.device, weight.dtype)
    for holder in backbone.modules():
        if isinstance(getattr(holder, "pattern", None), Pattern):
            holder.pattern = pattern
    return backbone


def _reads(module: nn.Module) -> bool:
    return isinstance(getattr(module, "operation", None), Operation)
