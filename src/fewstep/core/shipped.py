"""The recipes in the package: their names, files and headers."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).parent.parent / "recipes"


@cache
def shipped() -> Mapping[str, Path]:
    """Every recipe of the package by name: `world/dmd2` is the file `recipes/world/dmd2.yaml`."""
    found = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
    return MappingProxyType(found)


def header(path: Path) -> str:
    """The comment that a recipe file begins with: what it makes, how to run it, what it costs and gives."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def headline(path: Path) -> str:
    """The first sentence of a recipe's header."""
    first = header(path).partition("\n")[0].lstrip("# ")
    return re.split(r"(?<=[.!])\s", first, maxsplit=1)[0].rstrip(".")


def command_for(folder: Path | str) -> str | None:
    """The command that makes a missing `folder`, if a shipped recipe makes it: `fewstep train world/teacher --output
    runs/world/teacher` makes `runs/world/teacher/teacher`."""
    runs = {parent: parent.as_posix() for parent in Path(folder).parents}
    made = ((name, run) for run, path in runs.items() for name in shipped() if f"/{path}".endswith(f"/runs/{name}"))
    return next((f"fewstep train {name} --output {run}" for name, run in made), None)


def nearest(wanted: str) -> str | None:
    """The name most like `wanted`, which may also be an old path such as `recipes/world/dmd2.yaml`."""
    bare = re.sub(r"\.ya?ml$", "", wanted).rpartition("recipes/")[2]
    near = difflib.get_close_matches(bare, shipped(), n=1, cutoff=0.5)
    return near[0] if near else None
