"""Who takes part: the recipes in `recipes/leaderboard`, one file per row."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from fewstep.core.build import digest
from fewstep.core.held import held_objects
from fewstep.core.shipped import shipped
from fewstep.engine.probe import WorldProbe
from fewstep.leaderboard.budget import lengthened
from fewstep.leaderboard.stages import each, stages_of
from fewstep.leaderboard.switches import JOINED, SWITCHES, Changes
from fewstep.methods import flow_matching, frames, gan, motion, targets, turns
from fewstep.methods.feedback import random_step
from fewstep.methods.matching import base as matchings
from fewstep.methods.matching import reverse_kl
from fewstep.methods.rollouts import base as rollouts
from fewstep.methods.rollouts import grids
from fewstep.models.bundle import VideoModel
from fewstep.pipeline import Pipeline, Stage, read
from fewstep.recipe import Recipe

FOLDER = "leaderboard/"
PROBES = 4
"""Times at which a run is judged, evenly spread, the last one at its end. The best student by `WorldProbe`'s rule is kept."""

SHARED = (flow_matching, frames, gan, motion, targets, turns, random_step, matchings, reverse_kl, rollouts, grids)
"""What many methods call: a row counts as changed if one of them has changed."""


@dataclass(frozen=True)
class Contestant:
    """A recipe that takes part."""

    name: str
    path: Path
    changes: Changes = ()
    """Those of its switch."""

    @cached_property
    def recipe(self) -> Recipe | Pipeline:
        """As it is written in its file, with its switch, before it is cut to a budget."""
        return read(self.path, list(self.changes))

    @property
    def stages(self) -> tuple[Recipe | Stage, ...]:
        return stages_of(self.recipe)

    @property
    def method(self) -> str:
        """The names of its methods."""
        return ", then ".join(type(stage.method).__name__ for stage in self.stages)

    @property
    def paired(self) -> bool:
        """Whether it trains on a teacher's stored states, which are part of its budget."""
        return any("pairs" in stage.method.needs for stage in self.stages)

    @property
    def code(self) -> str:
        """12 characters: the recipe, the teacher, and the code of the method, of all that it holds and of `SHARED`; without
        docstrings, comments and what only refuses a recipe (`__post_init__`)."""
        held: set[Any] = {type(part) for stage in self.stages for part in held_objects(stage.method)}
        files = {Path(inspect.getfile(part)) for part in (*held, *SHARED)}
        sources = [hashlib.sha256(_bare(path).encode()).hexdigest() for path in sorted(files)]
        return digest([self.recipe.tree(), teacher_code(), sources])

    def prepared(self, budget: float, seed: int) -> Recipe | Pipeline:
        """The recipe for one run: as long as the budget allows, judged by the same rule as all others."""

        def own(stage: Any) -> Any:
            return replace(stage, settings=replace(stage.settings, seed=seed, health=None))

        recipe = each(lengthened(self.recipe, budget), own)
        last = stages_of(recipe)[-1]
        probe = WorldProbe(every=-(-last.settings.steps // PROBES), prompts=32)
        return each(recipe, lambda stage: replace(stage, probe=probe) if stage is last else stage)


def contestants() -> Mapping[str, Contestant]:
    """Everyone who takes part, by name: all recipes, then each switch on its row."""
    paths = {name.removeprefix(FOLDER): path for name, path in shipped().items() if name.startswith(FOLDER)}
    rows = {name: Contestant(name, path) for name, path in paths.items()}
    switched = [
        Contestant(f"{base}{JOINED}{switch}", paths[base], changes)
        for base, switches in SWITCHES.items() for switch, changes in switches.items()
    ]  # fmt: skip
    return rows | {one.name: one for one in switched}


@cache
def teacher_code() -> str:
    """Fingerprint of the teacher of all rows."""
    return VideoModel.from_pretrained("world").fingerprint("denoiser")


def _bare(path: Path) -> str:
    """The code of a file as a tree, without what changes no figure: docstrings, comments, and what only refuses a recipe."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _silent(part)]
    return ast.dump(tree)


def _silent(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "__post_init__"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
