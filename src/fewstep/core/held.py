"""A frozen object and what it holds: the objects that a recipe wrote inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def held_objects(thing: Any) -> Iterator[Any]:
    """`thing`, and every dataclass in its fields, at any depth, also in tuples and mappings."""
    yield thing
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
        for item in inner:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield from held_objects(item)
