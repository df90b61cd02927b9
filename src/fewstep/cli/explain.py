"""`fewstep explain`: print a recipe with its defaults, comments and papers; the output is a recipe again."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from fewstep.catalogue import entry, where
from fewstep.cli.screen import screen
from fewstep.core.held import held_objects
from fewstep.core.shipped import header, shipped
from fewstep.core.yaml import to_yaml
from fewstep.methods.base import Method, Sync, Update
from fewstep.models import Spec
from fewstep.pipeline import Pipeline, Stage, read
from fewstep.recipe import Recipe
from fewstep.written import find


def show(wanted: Path, overrides: list[tuple[str, str]], allow_imports: bool) -> int:
    recipe, file = read(wanted, overrides, allow_imports=allow_imports), find(wanted)
    out = screen()

    def say(line: str, note: str = "", style: str = "") -> None:
        out.print(Text(line, style=style) + Text(f"  # {note}" if note else "", style="dim"), soft_wrap=True)

    say(f"# recipe {recipe.hash}  ({wanted})", style="bold")
    if file in shipped().values():
        say(header(file), style="dim")
    for depth, line, note in lines(recipe, recipe.tree()):
        say("  " * depth + line, note)
    for title, each in _stages(recipe):
        say(title, style="bold")
        say("\n# one iteration", style="bold")
        for line in schedule(each.method):
            say(f"#   {line}")
        say("\n# papers", style="bold")
        for line in papers(each) or ["none"]:
            say(f"#   {line}")
    recipe.check()
    return 0


def _stages(recipe: Recipe | Pipeline) -> Iterator[tuple[str, Recipe | Stage]]:
    """Every recipe (one per stage), with a line that says where it starts."""
    if isinstance(recipe, Recipe):
        yield "", recipe
        return
    try:
        starts = [planned.recipe.settings.start for planned in recipe.plan(Path("OUTPUT"))]
    except (OSError, ValueError):  # a model is not here; the check at the end says so
        starts = [None] * len(recipe.stages)
    for number, ((name, stage), start) in enumerate(zip(recipe.stages.items(), starts, strict=True), 1):
        yield f"\n# stage {number} of {len(recipe.stages)}: {name}" + (f", start: {start}" if start else ""), stage


def lines(thing: Any, tree: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Depth, YAML line and note of everything below `thing`; `tree` is its printed form."""
    notes = field_notes(type(thing)) if dataclasses.is_dataclass(thing) else {}
    for key, plain in tree.items():
        value = thing.get(key) if isinstance(thing, Mapping) else getattr(thing, key, None)
        if not isinstance(plain, dict) or not plain:
            source = _place(thing) if key == "type" else ""
            yield 0, f"{key}: {to_yaml([plain], one_line=True)[1:-2]}", source or notes.get(key, "")
            continue
        source = "" if "type" in plain else _place(value)
        yield 0, f"{key}:", " ".join(filter(None, (notes.get(key, ""), source and f"({source})")))
        yield from ((depth + 1, line, note) for depth, line, note in lines(value, plain))


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
    """What is trained in the first iteration, and in the second one if it differs."""
    first, second = (_events(method, step) for step in (0, 1))
    return [first] if first == second else [f"first: {first}", f"second: {second}"]


def papers(thing: Any) -> list[str]:
    """Papers of the objects in a recipe, each once."""
    found: dict[str, None] = {}
    for held in held_objects(thing):
        about = entry(type(held))
        if about.cite:
            found[f"{about.name}: {about.cite}"] = None
    return list(found)


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


def _place(thing: Any) -> str:
    """File and line of the object's class, for objects with keys of their own."""
    if not dataclasses.is_dataclass(thing) or isinstance(thing, Spec):
        return ""
    file, line = where(type(thing))
    return f"{file}:{line}"
