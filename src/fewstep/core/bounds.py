"""Bounds of numbers, written next to a field's type; the builder refuses other values, and so can a class. So are words, and
objects of other classes, that a field does not accept.

`steps: Count` is a whole number from 1 to a thousand million. Numbers that are not finite are refused wherever a number is
expected, with or without bounds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fewstep.core.annotations import SEQUENCES, arms_of, classes_of, element_of, value_of
from fewstep.core.choices import nearest


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
    """ValueError names the first field of a dataclass whose number is out of bounds or in the wrong place, whose word is none of
    those accepted, or whose object is of another class: call it in `__post_init__`. Other types are not compared.

    `at` is where recipes have it: `settings.health`.
    """
    cls: Any = type(thing)
    for field in fields(thing):
        for key, wrong in _problems(_hints(cls)[field.name], getattr(thing, field.name, None), field.name):
            raise ValueError(f"{at}{'.' if at else ''}{key} {wrong}")


def _problems(expected: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and problem of every number and word in `value`, by its annotation."""
    if wrong := _class_problem(expected, value) or _list_problem(expected, value):
        yield key, wrong
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        kinds = {get_args(arm)[0] if get_origin(arm) is Annotated else arm: arm for arm in arms_of(expected)}
        if wrong := _word_problem(kinds, value) if isinstance(value, str) else _number_problem(kinds, value):
            yield key, wrong
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _problems(value_of(expected), item, f"{key}.{name}")
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _problems(element_of(expected, i), item, f"{key}[{i}]")


def _number_problem(kinds: Mapping[Any, Any], value: float) -> str:
    """What is wrong with a number, by kinds and their annotations; or nothing."""
    if isinstance(value, float) and not value.is_integer() and int in kinds and float not in kinds:
        return f"must be a whole number, got {value}"
    return next((bounds_of(kinds[kind]).problem(value) for kind in (int, float) if kind in kinds), "")


def _word_problem(kinds: Iterable[Any], value: str) -> str:
    """What is wrong with a text where some words are accepted, or numbers alone; or nothing."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words or {str, Path, Any, object}.intersection(kinds):
        return ""
    if words:
        return f"cannot be {value!r}; {nearest(value, map(str, words))}"
    return f"must be a number, got {value!r}" if {int, float}.intersection(kinds) else ""


def _class_problem(expected: Any, value: object) -> str:
    """What is wrong with an object where only those of other classes are accepted; or nothing. Protocols are not compared."""
    classes = tuple(cls for cls in classes_of(expected) if not getattr(cls, "_is_protocol", False))
    arms = arms_of(expected)
    none = type(None) in arms
    if not classes or len(classes) + none < len(arms) or isinstance(value, classes) or (none and value is None):
        return ""
    made = repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    return f"must be {' or '.join(arm.__name__ for arm in classes)}, got {made}"


def _list_problem(expected: Any, value: object) -> str:
    """What is wrong with a single number or word where only lists are accepted; or nothing."""
    lists = [arm for arm in arms_of(expected) if get_origin(arm) in SEQUENCES]
    alone = isinstance(value, (int, float, str)) and len(lists) == len(set(arms_of(expected)) - {type(None)})
    return f"must be a list, such as [1, 2], got {value!r}" if lists and alone else ""


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _short(value: float) -> str:
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else "a number of more than 30 digits"
