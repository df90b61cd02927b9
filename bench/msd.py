"""Several one-step students, each for a part of the prompts (MSD, 2410.23274), beside one student for all prompts.

    python bench/msd.py
    python bench/msd.py --parts 4 --attribute direction --budget 2

Each student has the recipe of the leaderboard's `dmd2+batch_4`, for one step alone. `--budget` is that of each student, in units
of what the demo spends on training; with `--together` it is that of all of them. The prompts and the noise of the clips are those
of the leaderboard. A stopped run resumes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from fewstep.data import Part
from fewstep.demo import fitted
from fewstep.evaluate import Entry, evaluate
from fewstep.leaderboard.budget import DEMO, lengthened
from fewstep.leaderboard.contest import contestants
from fewstep.leaderboard.runs import SUITE
from fewstep.models import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from fewstep.world.grammar import world_prompts
from fewstep.world.parts import ByAttribute
from measuring import rounded, show


@dataclass(frozen=True, kw_only=True)
class Case:
    """One division of the prompts."""

    parts: int = 2
    attribute: Literal["shape", "colour", "size", "direction", "speed", "background"] = "direction"
    budget: float = 1.0
    together: bool = False
    """Whether the students share the budget."""
    seed: int = 0
    output: str = "runs/msd"
    """Folder of the runs."""

    @property
    def by(self) -> ByAttribute:
        return ByAttribute(attribute=self.attribute, of=self.parts)


def main(case: Case) -> dict[str, Any]:
    one = student(case, None)
    texts = world_prompts(SUITE.prompts, SUITE.paraphrased, SUITE.seed)
    parts = list[dict[str, Any]]()
    for index in range(case.parts):
        own = tuple(text for text in texts if case.by.part(text) == index)
        models = {"one student": one, "its own": student(case, index)}
        rows = [Entry(name=name, model=model.prepared(Runtime()), steps=1) for name, model in models.items()]
        report = evaluate(rows, replace(SUITE, texts=own), Path(case.output) / f"figures-{folder(case, index)}")
        parts.append({"prompts": len(own)} | {
            row.name: {"accuracy": row.accuracy, "interval": row.accuracy_ci, "distance": row.frechet, "diversity": row.diversity}
            for row in report.rows
        })  # fmt: skip
    right = {name: sum(part["prompts"] * part[name]["accuracy"] for part in parts) / len(texts) for name in models}
    return {"accuracy": rounded(right), **{f"part {index}": part for index, part in enumerate(parts)}}


def student(case: Case, index: int | None) -> VideoModel:
    """The student of a part; None: of all prompts."""
    return VideoModel.from_pretrained(recipe_of(case, index).complete(Path(case.output) / folder(case, index)))


def recipe_of(case: Case, index: int | None) -> Recipe:
    row = contestants()["dmd2+batch_4"]
    recipe = Recipe.load(row.path, [*row.changes, ("method.rollout.grids", "[[1.0]]")])
    recipe = lengthened(recipe, DEMO * case.budget / (case.parts if case.together and index is not None else 1))
    part = None if index is None else Part(by=case.by, index=index)
    settings = replace(fitted(recipe.settings), seed=case.seed, health=None)
    return replace(recipe, data=WorldClips(part=part), settings=settings)


def folder(case: Case, index: int | None) -> str:
    named = f"{case.budget:g}-{case.seed}"
    if index is None:
        return f"all-{named}"
    return f"{case.attribute}-{index}-of-{case.parts}-{named}{'-together' if case.together else ''}"


if __name__ == "__main__":
    case = tyro.cli(Case, description=__doc__)
    show("msd", case, main(case))
