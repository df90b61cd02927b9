"""Experts by time: copies of a network that take turns, each for the steps of its own range of noise.

Phased DMD (2510.27684) trains one for each phase of a student's steps; Wan 2.2 is such a network from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.compress.transform import Transform
from fewstep.diffusion.experts import require_boundaries


@dataclass(frozen=True, kw_only=True)
class Experts(Transform):
    """Copies of the network, of which each denoises the clips of its own times. They begin equal."""

    boundaries: tuple[float, ...]
    """Times at which the experts change, decreasing: (0.9, 0.5) is three, for times from 0.9, from 0.5 and below. They are
    the network's own times, after the shift."""

    def __post_init__(self) -> None:
        require_boundaries(self.boundaries)

    @property
    def identity(self) -> bool:
        return False  # up to rounding: a batch with times of several experts is computed in parts

    def apply(self, network: Any) -> Any:
        if network.flow_head is not None:
            raise ValueError("a network with a flow head is not copied into experts; leave out FlowHead or Experts")
        return network.by_time(self.boundaries)
