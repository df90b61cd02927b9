"""`fewstep explain`: a recipe with everything that stands behind it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from fewstep.catalogue import entry, where
from fewstep.cli.screen import screen
from fewstep.methods.base import Method, Sync, Update
from fewstep.recipe import Recipe


def show(path: Path, overrides: list[tuple[str, str]], allow_imports: bool) -> int:
    recipe = Recipe.load(path, overrides, allow_imports=allow_imports)
    out = screen()
    out.print(Text(f"recipe {recipe.hash}  ({path})", style="bold"))
    for depth, key, value, note in lines(recipe):
        left = f"{'  ' * depth}{key}: {value}".rstrip()
        out.print(Text(left) + Text(f"  # {note}" if note else "", style="dim"))
    out.print(Text("\none iteration", style="bold"))
    for line in schedule(recipe.method):
        out.print(Text(f"  {line}"))
    out.print(Text("\npapers", style="bold"))
    for line in papers(recipe) or ["none"]:
        out.print(Text(f"  {line}"))
    recipe.check()
    return 0


def lines(thing: Any, depth: int = 0) -> Iterator[tuple[int, str, str, str]]:
    """Depth, key, value and note of every field below a dataclass."""
    notes = field_notes(type(thing))
    for field in dataclasses.fields(thing):
        value, note = getattr(thing, field.name), notes.get(field.name, "")
        if hasattr(value, "to_tree"):
            yield depth, field.name, value.type, note
            yield from ((depth + 1, key, _plain(inner), "") for key, inner in value.args.items())
        elif dataclasses.is_dataclass(value):
            file, line = where(type(value))
            yield depth, field.name, f"{type(value).__name__}  ({file}:{line})", note
            yield from lines(value, depth + 1)
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            yield depth, field.name, "", note
            for key, inner in value.items():
                yield depth + 1, key, "", ""
                yield from lines(inner, depth + 2)
        else:
            yield depth, field.name, _plain(value), note


def field_notes(cls: Any) -> dict[str, str]:
    """The docstring under each field, first sentence, base classes included."""
    found: dict[str, str] = {}
    for base in [c for c in reversed(cls.__mro__) if "__dataclass_fields__" in vars(c)]:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        statements = getattr(body, "body", [])
        for statement, after in zip(statements, statements[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_text(after):
                found[statement.target.id] = " ".join(after.value.value.split())
    return found


def schedule(method: Method) -> list[str]:
    """Who is trained in the first iteration, and in the second where it differs."""
    first, second = (_events(method, step) for step in (0, 1))
    return [first] if first == second else [f"first: {first}", f"second: {second}"]


def papers(thing: Any) -> list[str]:
    """Sources of the objects a recipe holds, each once."""
    found: dict[str, None] = {}
    for held in held_objects(thing):
        about = entry(type(held))
        if about.cite:
            found[f"{about.name}: {about.cite}"] = None
    return list(found)


def held_objects(thing: Any) -> Iterator[Any]:
    """Every dataclass below `thing`."""
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for item in inner:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield item
                yield from held_objects(item)


def _events(method: Method, step: int) -> str:
    words = []
    for event in method.updates(step):
        match event:
            case Update(roles):
                words.append("+".join(roles))
            case Sync(target, source, decay):
                words.append(f"{target} <- {decay:g} {target} + {1 - decay:g} {source}")
    return ", then ".join(words)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
