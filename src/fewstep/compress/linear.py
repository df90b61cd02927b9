"""Linear layers of any class: recognise them, find them in a network, name them in a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn


class Found(NamedTuple):
    """A linear layer and where it is; `setattr(parent, child, other)` puts another in its place."""

    name: str
    parent: nn.Module
    child: str
    layer: nn.Module


def is_linear(module: nn.Module) -> bool:
    """Does it map `[..., in_features]` to `[..., out_features]`, with nothing but that as its argument?"""
    sizes = (getattr(module, size, None) for size in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def linears(network: nn.Module, path: str = "") -> Iterator[Found]:
    """Every linear layer; what is inside of one is its own business. Not the output layer of torch's `MultiheadAttention`,
    which is never called: its weight is read."""
    for child, layer in network.named_children():
        name = f"{path}.{child}" if path else child
        if not is_linear(layer):
            yield from linears(layer, name)
        elif not isinstance(network, nn.MultiheadAttention):
            yield Found(name, network, child, layer)


def ends(name: str, target: str) -> bool:
    """Is `target` the name of a layer, or the last parts of it?"""
    return name == target or name.endswith(f".{target}")


def chosen(network: nn.Module, targets: tuple[str, ...]) -> list[Found]:
    """The linear layers of a backbone or denoiser that `targets` name by the last parts of their names; if empty, all in blocks.

    ValueError for a target that no layer has.
    """
    every = list(linears(network))
    inside = [found for found in every if found.name.startswith(("blocks.", "backbone.blocks."))]
    for target in targets:
        if not any(ends(found.name, target) for found in every):
            raise ValueError(f"no linear layer is called {target!r}; the blocks have {', '.join(kinds(inside))}")
    return [found for found in every if any(ends(found.name, t) for t in targets)] if targets else inside


def kinds(layers: Iterable[Found]) -> list[str]:
    """Names of layers within their block, each once."""
    return sorted({found.name.partition("blocks.")[2].partition(".")[2] for found in layers})
