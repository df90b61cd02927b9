"""Commands that say what there is and write nothing, with their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides


@dataclass(frozen=True)
class Watch(Command):
    """Show how a run is doing: its verdict and figures beside the teacher's, its losses. Live on a terminal."""

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Output folder of a run, going on or ended."""
    every: float = 2.0
    """Seconds between two looks; 0 prints once."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import watch

        return watch.show(self.run_folder, every=self.every)


@dataclass(frozen=True)
class List(Command):
    """Print what there is, with its source and paper."""

    kind: Positional[
        Literal[
            "recipes",
            "methods",
            "models",
            "networks",
            "data",
            "rollouts",
            "patterns",
            "caches",
            "transforms",
            "samplers",
            "grids",
            "paths",
            "densities",
            "settings",
        ]
    ]
    json: bool = False
    """A list of objects with name, doc, cite, file and line."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import listing

        return listing.show(self.kind, as_json=self.json)


@dataclass(frozen=True)
class Explain(Command):
    """Print a recipe with every default, what each key means, where each class is defined, and the papers.

    What is printed is a recipe: `fewstep explain world/dmd2 > mine.yaml` makes one of your own to change."""

    takes_overrides: ClassVar[bool] = True

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE")]]
    """A name of `fewstep list recipes`, a YAML file, or the folder of a run or student."""
    allow_imports: bool = False
    """Import the classes outside fewstep that the recipe file names, which runs their code. Default: refuse."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import explain

        return explain.show(self.recipe, overrides, self.allow_imports)


@dataclass(frozen=True)
class Doctor(Command):
    """Print what this machine has, and which of it will be used and why."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import doctor

        return doctor.show()
