"""Annotations taken apart: the arms of a union, and what the elements of a container are."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

UNIONS = (Union, types.UnionType)
MAPPINGS = (dict, Mapping)
SEQUENCES = (tuple, list, Sequence, frozenset)
"""What a list in a recipe can become."""


def arms_of(expected: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else, that alone."""
    return get_args(expected) if get_origin(expected) in UNIONS else (expected,)


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
