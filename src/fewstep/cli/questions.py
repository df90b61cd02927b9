"""Commands that print information and write nothing, with their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides


@dataclass(frozen=True)
class Watch(Command):
    """Show the state of a run: verdict, losses, and figures next to the teacher's. On a terminal the view is updated."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a running or finished run."""
    every: float = 2.0
    """Seconds between two updates; 0 prints once."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import watch

        return watch.show(self.run_folder, every=self.every)


@dataclass(frozen=True)
class List(Command):
    """List what a recipe can name, with source file and paper; and the public students that can be imported."""

    kind: Positional[
        Literal[
            "recipes",
            "students",
            "methods",
            "models",
            "networks",
            "data",
            "partitions",
            "rollouts",
            "histories",
            "matchings",
            "adversaries",
            "rewards",
            "patterns",
            "memories",
            "caches",
            "transforms",
            "samplers",
            "grids",
            "paths",
            "densities",
            "settings",
        ]
    ]
    """What to list."""
    json: bool = False
    """Print a JSON list of objects with name, doc, cite, file and line."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import listing

        return listing.show(self.kind, as_json=self.json)


@dataclass(frozen=True)
class Explain(Command):
    """Print a recipe with every default, the meaning of each key, the file of each class, and the papers.

    The output is a recipe itself: `fewstep explain world/dmd2 > mine.yaml` writes one for you to edit."""

    takes_overrides: ClassVar[bool] = True

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE")]]
    """Recipe: a name from `fewstep list recipes`, a YAML file, or the folder of a run or student."""
    allow_imports: bool = False
    """Import classes outside fewstep that the recipe file names; this runs their code (default: refuse)."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import explain

        return explain.show(self.recipe, overrides, self.allow_imports)


@dataclass(frozen=True)
class Doctor(Command):
    """Print what this machine has, what fewstep will use, and why."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import doctor

        return doctor.show()
