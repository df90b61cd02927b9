"""Which of several experts denoises at a time: they take turns, from noise to data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

T = TypeVar("T", float, Tensor)


def require_boundaries(boundaries: Sequence[float]) -> None:
    """ValueError for boundaries that do not decrease between 1 and 0, and for none."""
    if not boundaries or not all(a > b for a, b in pairwise((1, *boundaries, 0))):
        raise ValueError(f"boundaries decrease between 1 and 0, and there is at least one; got {list(boundaries)}")


def expert_at(boundaries: Sequence[float], t: T) -> T:
    """The number of the expert for time t, from 0: an expert begins at its boundary, and later ones are below.

    >>> [expert_at((0.9, 0.5), t) for t in (1.0, 0.9, 0.89, 0.5, 0.0)]
    [0, 0, 1, 1, 2]
    """
    return sum(t < boundary for boundary in boundaries)  # type: ignore[return-value]
