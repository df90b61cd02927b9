"""What a change has gained: the difference of two rows, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from statistics import mean

from fewstep.evaluate.results import Range


@dataclass(frozen=True)
class Difference:
    """`value`, and the interval around it."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether its interval is on one side of 0."""
        return self.low > 0 or self.high < 0


def difference(one: Sequence[tuple[float, Range]], other: Sequence[tuple[float, Range]]) -> Difference:
    """Mean of `one` less mean of `other`: figures with their intervals, one of each seed.

    The interval is that of independent samples (MOVER, Zou and Donner 2008; for shares, Newcombe 1998, method 10), with intervals
    that are means over seeds. Both rows show the same prompts, so the true one is rather shorter.
    """
    (a, below_a, above_a), (b, below_b, above_b) = _sides(one), _sides(other)
    return Difference(a - b, a - b - hypot(below_a, above_b), a - b + hypot(above_a, below_b))


def _sides(figures: Sequence[tuple[float, Range]]) -> tuple[float, float, float]:
    """Mean, and how far the interval reaches below and above it."""
    middle = mean(value for value, _ in figures)
    low, high = (mean(interval[side] for _, interval in figures) for side in (0, 1))
    return middle, middle - low, high - middle
