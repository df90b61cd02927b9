"""Annotations taken apart: the arms of a union, the classes among them, and what the elements of a container are."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

SCALARS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
}  # fmt: skip
"""Types of single values, and what messages call them."""
UNIONS = (Union, types.UnionType)
MAPPINGS = (dict, Mapping)
SEQUENCES = (tuple, list, Sequence, frozenset)
"""What a list in a recipe can become."""


def arms_of(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, that alone."""
    return get_args(expected) if get_origin(expected) in UNIONS else (expected,)


def classes_of(expected: Any) -> tuple[type, ...]:
    """The classes among the alternatives: of objects, and not of numbers, texts and containers. `Any` and `object` are none."""
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    plain = {*SCALARS, *SEQUENCES, *MAPPINGS, type(None), object, Any}
    return tuple(a for a in arms_of(expected) if isinstance(a, type) and get_origin(a) is None and a not in plain)


def value_of(expected: Any) -> Any:
    """The annotation of the values of a mapping that is annotated `expected`; None if it says nothing of them."""
    arguments = _arguments(expected, MAPPINGS)
    return arguments[1] if arguments else None


def element_of(expected: Any, index: int) -> Any:
    """The annotation of element `index` of a sequence that is annotated `expected`; None if it says nothing of it."""
    arguments = _arguments(expected, SEQUENCES)
    if not arguments:
        return None
    return arguments[index] if index < len(arguments) and arguments[index] is not Ellipsis else arguments[0]


def _arguments(expected: Any, containers: tuple[Any, ...]) -> tuple[Any, ...]:
    return next((get_args(arm) for arm in arms_of(expected) if get_origin(arm) in containers), ())
