"""The work of a network in one iteration, for plans and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Work of one network on one clip in one iteration, in forward-equivalents: a forward pass is 1, a backward pass 2."""

    role: str
    forwards: float
    frames: int = 0
    """Number of single frames of the clip that the network reads (at most all of them); 0: the whole clip."""
    layers: tuple[int, ...] = ()
    """Blocks whose output is used; the network runs up to the deepest. Empty: the whole network."""


def in_forwards(cost: Sequence[Work]) -> str:
    """Forward-equivalents in words, whole clips first.

    >>> in_forwards([Work("student", 4.5), Work("critic", 3, frames=4), Work("teacher", 2, layers=(0, 1))])
    '4.5, 3 of 4 frames, 2 of the first 2 blocks'
    """
    sums: dict[str, float] = {"": 0.0}
    for work in cost:
        what = f" of {work.frames} frames" if work.frames else ""
        what += f" of the first {max(work.layers) + 1} blocks" if min(work.layers, default=-1) >= 0 else ""
        sums[what] = sums.get(what, 0.0) + work.forwards
    return ", ".join(f"{forwards:g}{what}" for what, forwards in sums.items())
