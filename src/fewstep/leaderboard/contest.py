"""Who takes part: the recipes in `recipes/leaderboard`, one file per row."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.core.build import digest
from fewstep.core.shipped import headline, shipped
from fewstep.engine.probe import WorldProbe
from fewstep.leaderboard.budget import lengthened
from fewstep.methods import targets
from fewstep.pipeline import Pipeline, Stage, read
from fewstep.recipe import Recipe

FOLDER = "leaderboard/"
PROBES = 4
"""Times at which a run is judged, evenly spread, the last one at its end. The best student by `WorldProbe`'s rule is kept."""


@dataclass(frozen=True)
class Contestant:
    """A recipe that takes part."""

    name: str
    path: Path

    @property
    def headline(self) -> str:
        """What it is, in one sentence."""
        return headline(self.path)

    @cached_property
    def recipe(self) -> Recipe | Pipeline:
        """As it is written in its file, before it is cut to a budget."""
        return read(self.path, [])

    @property
    def stages(self) -> tuple[Recipe | Stage, ...]:
        return tuple(self.recipe.stages.values()) if isinstance(self.recipe, Pipeline) else (self.recipe,)

    @property
    def method(self) -> str:
        """The names of its methods."""
        return ", then ".join(type(stage.method).__name__ for stage in self.stages)

    @property
    def cite(self) -> str:
        return self.stages[-1].method.cite

    @property
    def paired(self) -> bool:
        """Whether it trains on a teacher's stored states, which are part of its budget."""
        return any("pairs" in stage.method.needs for stage in self.stages)

    @property
    def code(self) -> str:
        """12 characters: the recipe, and the code of the method and of all that it holds, without docstrings and comments."""
        held = {type(found) for stage in self.stages for found in _objects(stage.method)}
        files = {Path(inspect.getfile(kind)) for kind in held} | {Path(targets.__file__)}
        sources = [hashlib.sha256(_bare(path).encode()).hexdigest() for path in sorted(files)]
        return digest([self.recipe.tree(), sources])

    def prepared(self, budget: float, seed: int) -> Recipe | Pipeline:
        """The recipe for one run: as long as the budget allows, judged by the same rule as all others."""
        recipe = lengthened(self.recipe, budget)
        if isinstance(recipe, Pipeline):
            *before, last = recipe.stages.items()
            stages = {name: replace(stage, settings=_own(stage, seed)) for name, stage in before}
            return replace(recipe, stages={**stages, last[0]: _judged(last[1], seed)})
        return _judged(recipe, seed)


def contestants() -> Mapping[str, Contestant]:
    """Everyone who takes part, by name."""
    names = {name.removeprefix(FOLDER): path for name, path in shipped().items() if name.startswith(FOLDER)}
    return {name: Contestant(name, path) for name, path in names.items()}


def _judged(stage: Any, seed: int) -> Any:
    settings = _own(stage, seed)
    return replace(stage, settings=settings, probe=WorldProbe(every=-(-settings.steps // PROBES), prompts=32))


def _own(stage: Any, seed: int) -> Any:
    return replace(stage.settings, seed=seed, health=None)


def _objects(value: Any) -> Iterator[Any]:
    """A frozen object and all objects in its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from _objects(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _objects(item)


def _bare(path: Path) -> str:
    """The code of a file as a tree, without docstrings and comments, which change no figure."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _text(part)]
    return ast.dump(tree)


def _text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
