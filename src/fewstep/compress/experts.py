"""Experts by time: copies of a network that take turns, each for the steps of its own range of noise.

Phased DMD (2510.27684) trains one for each phase of a student's steps; Wan 2.2 is such a network from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fewstep.compress.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Experts(Transform):
    """Copies of the network, of which each denoises the clips of its own times. They begin equal."""

    boundaries: tuple[float, ...]
    """Times at which the experts change, decreasing: (0.9, 0.5) is three, for times from 0.9, from 0.5 and below. They are
    the network's own times, after the shift."""

    def __post_init__(self) -> None:
        if not self.boundaries or not all(a > b for a, b in pairwise((1, *self.boundaries, 0))):
            raise ValueError(
                f"boundaries decrease between 1 and 0, and there is at least one; got {list(self.boundaries)}"
            )

    @property
    def identity(self) -> bool:
        return False  # up to rounding: a batch with times of several experts is computed in parts

    def apply(self, network: Any) -> Any:
        return network.by_time(self.boundaries)


def expert_at(boundaries: Sequence[float], t: float) -> int:
    """The number of the expert for time t, from 0: an expert begins at its boundary, and later ones are below.

    >>> [expert_at((0.9, 0.5), t) for t in (1.0, 0.9, 0.89, 0.5, 0.0)]
    [0, 0, 1, 1, 2]
    """
    return sum(t < boundary for boundary in boundaries)
