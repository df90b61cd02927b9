"""Frozen dataclasses from plain trees and back: the strict reader and writer of recipes and cards.

`build(expected, tree, names)` follows the annotations of `expected`. Nothing is guessed: an unknown key, name or
literal, a missing key or a wrong type is a `RecipeError` that names the place, the accepted values and the nearest
right one.

Where an annotation is abstract, or a union of several classes, the key `type` chooses the class: a name of `names`, or
an import path `package.module:Class`. What is outside fewstep is imported only from a document that the user vouches for
(`At.trusted`). A class may take over with `from_tree(tree, names, at)` and `to_tree()`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import sys
import types
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fewstep.core.annotations import MAPPINGS, SCALARS, SEQUENCES, UNIONS, arms_of, classes_of, element_of, value_of
from fewstep.core.bounds import bounds_of
from fewstep.core.choices import nearest
from fewstep.core.yaml import NUMBER, RecipeError, digest, load_yaml, to_yaml

__all__ = [
    "At", "Names", "Parameter", "Raw", "RecipeError", "build", "build_arguments", "describe", "digest", "dump",
    "find_class", "load_yaml", "parameters", "to_yaml", "type_name", "unknown",
]  # fmt: skip

Names = Mapping[str, type]
_MISSING = dataclasses.MISSING
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class Raw(str):
    """Text from the command line: read as YAML wherever anything but text is expected."""


@dataclass(frozen=True)
class At:
    """A place in a tree: `where` is the document ("recipe", "card.json"), `path` the dotted keys."""

    where: str = "recipe"
    path: str = ""
    trusted: bool = False
    """Whether to import classes outside fewstep for it. If not, they must have been imported before."""

    def key(self, key: object) -> At:
        return replace(self, path=f"{self.path}.{key}" if self.path else str(key))

    def item(self, index: int) -> At:
        return replace(self, path=f"{self.path}[{index}]")

    def fail(self, problem: str) -> RecipeError:
        return RecipeError(f"{self.where}: {self.path or 'the top level'} {problem}")

    def refuse(self, error: ValueError) -> RecipeError:
        """What a class says of its arguments, with the place; where it names the place itself, once."""
        known = not self.path or str(error).startswith(f"{self.path}.")
        return RecipeError(f"{self.where}: {error}" if known else f"{self.where}: {self.path}: {error}")


@dataclass(frozen=True)
class Parameter:
    """One key a class accepts."""

    name: str
    type: Any
    default: Any = _MISSING

    @property
    def required(self) -> bool:
        return self.default is _MISSING


def build(expected: Any, tree: Any, names: Names = types.MappingProxyType({}), at: At | str = "recipe") -> Any:
    """An object of type `expected` from a plain `tree`; RecipeError where the two disagree. `at` names the document."""
    at = At(at) if isinstance(at, str) else at
    bounds = bounds_of(expected)
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    if isinstance(tree, Raw):
        tree = _read_raw(expected, tree, at)
    origin = get_origin(expected)
    if expected is Any or expected is object:
        return tree
    if origin is Literal:
        return _literal(get_args(expected), tree, at)
    if origin in UNIONS:
        return _union(expected, tree, names, at)
    if expected is None or expected is type(None):
        if tree is not None:
            raise at.fail(f"must be null, got {_show(tree)}")
        return None
    if expected in SCALARS:
        value = _scalar(expected, tree, at)
        if expected in (int, float) and (wrong := bounds.problem(value)):
            raise at.fail(wrong)
        return value
    if (origin or expected) in SEQUENCES:
        return _sequence(expected, tree, names, at)
    if (origin or expected) in MAPPINGS:
        return _mapping(expected, tree, names, at)
    return _object((expected,), tree, names, at)


def build_arguments(
    target: Callable[..., Any], tree: Mapping[str, Any], names: Names, at: At | str = "recipe"
) -> dict[str, Any]:
    """Keyword arguments for `target` (a dataclass or any class with an annotated constructor) from a plain `tree`."""
    at = At(at) if isinstance(at, str) else at
    wanted = {p.name: p for p in parameters(target)}
    for key in tree:
        if key not in wanted:
            raise unknown(at, str(key), wanted)
    for parameter in wanted.values():
        if parameter.required and parameter.name not in tree:
            owner = getattr(target, "__name__", str(target))
            raise at.key(parameter.name).fail(f"is missing: {owner} needs it ({describe(parameter.type)})")
    return {key: build(wanted[key].type, value, names, at.key(key)) for key, value in tree.items()}


def dump(value: Any, expected: Any = None) -> Any:
    """The plain tree of `value`, all defaults written out: `build(expected, dump(x), names) == x`.

    `type` is written wherever `build` needs it. Classes of this package are written by name, others by import path.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, Mapping):
        inner = value_of(expected)
        return {str(key): dump(item, inner) for key, item in value.items()}
    if isinstance(value, (tuple, list, frozenset)):
        items = sorted(value) if isinstance(value, frozenset) else value
        return [dump(item, element_of(expected, i)) for i, item in enumerate(items)]
    if hasattr(value, "to_tree"):
        return value.to_tree()
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} cannot be written in a recipe: it is not a dataclass")
    tree = {} if not _typed(type(value), expected) else {"type": type_name(type(value))}
    return tree | {p.name: dump(getattr(value, p.name), p.type) for p in parameters(type(value))}  # type: ignore[arg-type]


@cache
def parameters(target: Callable[..., Any]) -> tuple[Parameter, ...]:
    """What `target` can be built from: fields of a dataclass, or the arguments of a constructor or function."""
    if dataclasses.is_dataclass(target):
        hints = get_type_hints(target, include_extras=True)
        return tuple(Parameter(f.name, hints[f.name], _default(f)) for f in dataclasses.fields(target) if f.init)
    function: Any = target.__dict__.get("__init__", target.__init__) if isinstance(target, type) else target  # type: ignore[misc]
    hints, signature = get_type_hints(function, include_extras=True), inspect.signature(target)
    taken = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = {p.name: _MISSING if p.default is p.empty else p.default for p in taken}
    return tuple(Parameter(name, hints.get(name, Any), default) for name, default in found.items())


def unknown(at: At, key: str, accepted: Iterable[str]) -> RecipeError:
    """The error for a key that nothing reads."""
    return at.key(key).fail(f"is unknown; {nearest(key, accepted)}")


def type_name(cls: type) -> str:
    """How a recipe names `cls`."""
    return cls.__qualname__ if cls.__module__.startswith("fewstep.") else f"{cls.__module__}:{cls.__qualname__}"


def describe(expected: Any) -> str:
    """An annotation in words, for messages: `a whole number`, `one of off, bf16`, `a list of numbers`."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in UNIONS:
        return " or ".join(describe(a) for a in arguments)
    if origin in SEQUENCES:
        return "a list of " + ", ".join(dict.fromkeys(describe(a) for a in arguments if a is not Ellipsis))
    if origin in MAPPINGS:
        return f"keys with {describe(arguments[1])} each"
    return "null" if expected is type(None) else SCALARS.get(expected, getattr(expected, "__name__", str(expected)))


def _scalar(expected: type, tree: Any, at: At) -> Any:
    if expected is bool and isinstance(tree, bool):
        return tree
    if expected is int and isinstance(tree, int) and not isinstance(tree, bool):
        return tree
    if expected is float and isinstance(tree, (int, float)) and not isinstance(tree, bool):
        return float(tree) if isinstance(tree, float) or abs(tree) < 10**300 else math.copysign(math.inf, tree)
    if expected is float and isinstance(tree, str) and NUMBER.fullmatch(tree):
        return float(tree)
    if expected is str and isinstance(tree, str):
        return str(tree)
    if expected is Path and isinstance(tree, (str, Path)):
        return Path(tree)
    raise at.fail(f"must be {SCALARS[expected]}, got {_show(tree)}")


def _literal(accepted: tuple[Any, ...], tree: Any, at: At) -> Any:
    for value in accepted:
        if value == tree and type(value) is type(tree):
            return value
    raise at.fail(f"cannot be {_show(tree)}; {nearest(str(tree), map(str, accepted))}")


def _union(expected: Any, tree: Any, names: Names, at: At) -> Any:
    arms = get_args(expected)
    if tree is None and type(None) in arms:
        return None
    classes = classes_of(expected)
    if isinstance(tree, Mapping) and classes:
        return _object(classes, tree, names, at)
    plain = [arm for arm in arms if arm not in classes and arm is not type(None)]
    if not plain and classes:
        return _object(classes, tree, names, at)
    first: RecipeError | None = None
    for arm in plain:
        try:
            return build(arm, tree, names, at)
        except RecipeError as error:
            first = first or error
    if len(plain) == 1 and not classes and first is not None:
        raise first
    raise at.fail(f"must be {describe(expected)}, got {_show(tree)}")


def _sequence(expected: Any, tree: Any, names: Names, at: At) -> Any:
    if not isinstance(tree, (list, tuple)):
        raise at.fail(f"must be a list, such as [1, 2], got {_show(tree)}")
    arguments, made = get_args(expected), get_origin(expected) or expected
    fixed = made is tuple and arguments and Ellipsis not in arguments
    if fixed and len(arguments) != len(tree):
        raise at.fail(f"must be a list of {len(arguments)} values, got {len(tree)}: {_show(tree)}")
    kinds = arguments if fixed else (arguments[:1] or (Any,)) * len(tree)
    items = [build(kind, item, names, at.item(i)) for i, (kind, item) in enumerate(zip(kinds, tree, strict=True))]
    return items if made is list else frozenset(items) if made is frozenset else tuple(items)


def _mapping(expected: Any, tree: Any, names: Names, at: At) -> dict[str, Any]:
    _require_mapping(tree, at)
    kind = (get_args(expected) or (str, Any))[1]
    return {key: build(kind, item, names, at.key(key)) for key, item in tree.items()}


def _object(classes: tuple[Any, ...], tree: Any, names: Names, at: At) -> Any:
    """One object of one of `classes`."""
    for cls in classes:
        if isinstance(cls, type) and isinstance(tree, cls):
            return tree  # already built: Python callers may mix objects into a tree
    if len(classes) == 1 and hasattr(classes[0], "from_tree"):
        return classes[0].from_tree(tree, names, at)
    _require_mapping(tree, at)
    cls, rest = _choose(classes, tree, names, at)
    if hasattr(cls, "from_tree"):
        return cls.from_tree(rest, names, at)
    arguments = build_arguments(cls, rest, names, at)
    try:
        return cls(**arguments)
    except RecipeError:
        raise
    except ValueError as error:
        raise at.refuse(error) from error


def _choose(classes: tuple[Any, ...], tree: Mapping[str, Any], names: Names, at: At) -> tuple[type, dict[str, Any]]:
    """The class `tree` asks for, and the tree without the key that chose it."""
    many = len(classes) > 1 or _abstract(classes[0])
    if not many and ("type" not in tree or "type" in {p.name for p in parameters(classes[0])}):
        return classes[0], dict(tree)
    choices = {name: cls for name, cls in names.items() if issubclass(cls, classes) and not _abstract(cls)}
    choices |= {cls.__name__: cls for cls in classes if not _abstract(cls)}
    if "type" not in tree:
        raise at.key("type").fail(f"is missing; {nearest('', choices)}")
    chosen = find_class(tree["type"], classes, choices, at.key("type"))
    return chosen, {key: value for key, value in tree.items() if key != "type"}


def find_class(name: Any, base: type | tuple[type, ...], choices: Names, at: At) -> Any:
    """The class that `name` means: one of `choices`, or an import path of a subclass of `base`."""
    name = str(name) if isinstance(name, Raw) else name
    if isinstance(name, str) and ":" in name:
        chosen = _import(name, at)
        if not issubclass(chosen, base):
            wanted = base if isinstance(base, tuple) else (base,)
            raise at.fail(f"is {name}, which is not a {' or '.join(c.__name__ for c in wanted)}")
        if _abstract(chosen):
            raise at.fail(f"is {name}, which is abstract; {nearest(chosen.__name__, choices)}")
        return chosen
    if not isinstance(name, str) or name not in choices:
        raise at.fail(f"cannot be {_show(name)}; {nearest(str(name), [*choices, 'package.module:Class'])}")
    return choices[name]


def _import(path: str, at: At) -> type:
    module, _, name = path.partition(":")
    if not _DOTTED.fullmatch(module) or not _DOTTED.fullmatch(name) or module.endswith(".__main__"):
        raise at.fail(f"cannot be {_show(path)}; a class outside fewstep is written package.module:Class")
    if not (at.trusted or module in sys.modules or module.startswith("fewstep.")):
        raise at.fail(
            f"is {path!r}, a class outside fewstep, and its code is not run unasked. If you trust it, import {module} in "
            "Python before, or give --allow-imports with a recipe file of your own, outside folders of runs and weights"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # somebody else's module may fail in any way
        raise at.fail(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise at.fail(f"is {path}, which is not a class")
    return found


def _require_mapping(tree: Any, at: At) -> None:
    if not isinstance(tree, Mapping):
        raise at.fail(f"must be keys and values, got {_show(tree)}")
    for key in tree:
        if not isinstance(key, str):
            raise at.fail(f"has the key {key!r}, which is not text; write '{key}'")


def _read_raw(expected: Any, raw: Raw, at: At) -> Any:
    """Command-line text as the plain value `expected` wants: text stays text, anything else is YAML."""
    arms = arms_of(expected)
    wants_text = any(arm in (str, Path) or (get_origin(arm) is Literal and str(raw) in get_args(arm)) for arm in arms)
    value = load_yaml(raw, f"{at.where}: {at.path}") if raw.strip() else ""
    plain = not isinstance(value, (Mapping, list)) and not (value is None and type(None) in arms)
    return str(raw) if plain and wants_text else value


def _abstract(cls: type) -> bool:
    return inspect.isabstract(cls) or ABC in cls.__bases__


def _typed(cls: type, expected: Any) -> bool:
    """Whether `cls` must be named where `expected` is annotated."""
    if expected is None or expected is Any:
        return any(_abstract(base) for base in cls.__mro__[1:-1] if base is not ABC)
    return classes_of(expected) != (cls,)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not _MISSING else field.default


def _show(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
