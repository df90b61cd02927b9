"""Bounds of numbers, written next to a field's type; the builder refuses other values, and so can a class.

`steps: Count` is a whole number from 1 to a thousand million. Numbers that are not finite are refused wherever a number is
expected, with or without bounds.
"""

from __future__ import annotations

import math
import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """From `least` to `most`, both included, more than `above`, less than `below`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str:
        """What is wrong with `value` ("must be at least 1, got 0"), or nothing."""
        wrong = ""
        if isinstance(value, float) and not math.isfinite(value):
            wrong = "a finite number"
        elif self.least is not None and value < self.least:
            wrong = f"at least {self.least}"
        elif self.most is not None and value > self.most:
            wrong = f"at most {self.most:,}"
        elif self.above is not None and value <= self.above:
            wrong = f"more than {self.above}"
        elif self.below is not None and value >= self.below:
            wrong = f"less than {self.below}"
        return f"must be {wrong}, got {_short(value)}" if wrong else ""


ANY = Bounds()
WHOLE = Bounds(-(2**63), 2**63 - 1)
"""Whole numbers without bounds of their own: what fits in 64 bits."""

Count = Annotated[int, Bounds(1, 10**9)]
"""How many: at least one."""
Natural = Annotated[int, Bounds(0, 10**9)]
"""How many, or none."""
Size = Annotated[int, Bounds(1, 65_536)]
"""Pixels, frames, clips at once, and the widths of networks."""
Depth = Annotated[int, Bounds(1, 1_024)]
"""Layers and heads."""
FrameRate = Annotated[int, Bounds(1, 1_000)]
Positive = Annotated[float, Bounds(above=0)]
Amount = Annotated[float, Bounds(0)]
"""A number that is not negative."""
Fraction = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(0, below=1)]
"""A share that is never all of it."""
Decay = Annotated[float, Bounds(0, below=1)]
"""Decay of a running average. At 1 the average would never change."""


def bounds_of(expected: Any) -> Bounds:
    """The bounds that stand in an annotation, or those of every number of its type."""
    extras = get_args(expected)[1:] if get_origin(expected) is Annotated else ()
    plain = get_args(expected)[0] if extras else expected
    return next((extra for extra in extras if isinstance(extra, Bounds)), WHOLE if plain is int else ANY)


def require_bounds(thing: Any, at: str = "") -> None:
    """ValueError names the first field of a dataclass whose number is out of bounds: call it in `__post_init__`.

    `at` is where recipes have it: `settings.health`.
    """
    cls: Any = type(thing)
    for name, expected in _hints(cls).items():
        for key, wrong in _problems(expected, getattr(thing, name, None), name):
            raise ValueError(f"{at}{'.' if at else ''}{key} {wrong}")


def _problems(expected: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and problem of every number in `value`, by its annotation."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        arms = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
        kinds = {arm: get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms}
        found = [arm for arm, kind in kinds.items() if kind in (int, float)]
        if found and (wrong := bounds_of(found[0]).problem(value)):
            yield key, wrong
    elif isinstance(value, Mapping) and len(get_args(expected)) == 2:
        for name, item in value.items():
            yield from _problems(get_args(expected)[1], item, f"{key}.{name}")
    elif isinstance(value, tuple) and get_args(expected):
        each = get_args(expected)
        for i, item in enumerate(value):
            yield from _problems(each[0] if Ellipsis in each else each[min(i, len(each) - 1)], item, f"{key}[{i}]")


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _short(value: float) -> str:
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else "a number of more than 30 digits"
