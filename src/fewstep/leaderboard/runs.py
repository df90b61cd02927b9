"""One run of the leaderboard: train within the budget, measure, write one JSON file. A stopped run resumes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.core.atomic import write_text
from fewstep.core.build import digest
from fewstep.core.lock import holding
from fewstep.core.yaml import load_json
from fewstep.data.pairs import PairPlan, StoredPairs, make_pairs
from fewstep.demo import fitted
from fewstep.diffusion import CFG
from fewstep.engine.log import read_metrics
from fewstep.evaluate import Entry, Suite, evaluate
from fewstep.evaluate.latency import peak_memory
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.leaderboard.budget import DEMO, work
from fewstep.leaderboard.contest import Contestant, teacher_code
from fewstep.leaderboard.results import COUNTS, TEACHER, Figures, Result, file_of, load_result, number
from fewstep.leaderboard.stages import each, stages_of
from fewstep.methods import FromPairs
from fewstep.methods.rollouts.grids import exact
from fewstep.models.bundle import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.pipeline import Pipeline
from fewstep.recipe import Recipe
from fewstep.world.grammar import world_prompts

SUITE = Suite(prompts=96, seeds_per_prompt=2, batch=32, seed=2027, latency_runs=3, latency_budget=1.0)
"""What every row is measured on: 192 clips of 96 prompts. The probe's prompts are others. Training draws scenes of the built-in
world at random, with seeds of its own, so some of the 96 occur in it."""

FIGURES = "figures"
"""Folder of a run's evaluation, with its clips."""

PAIRED = 0.5
"""Share of its budget that a method on stored pairs spends on making them."""

PAIR_STEPS = 20
"""Steps of the teacher for a pair."""

APART = 1_000_000
"""Between the noise seeds of the pairs of two runs with neighbouring seeds: more than the pairs of the largest budget."""

LARGEST, SEEDS = 1000, 1000
"""The largest budget, and the number of seeds: all seeds of pairs are below those of `SUITE`'s clips."""

COST = "cost.json"
"""File in the folder of a complete training: its seconds and its peak memory."""


@dataclass(frozen=True)
class Run:
    """A contestant with a budget (1: the demo's) and a seed."""

    contestant: Contestant
    budget: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.budget <= LARGEST:  # not nan either
            raise ValueError(f"a budget is a number above 0 and at most {LARGEST}, not {self.budget}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"a seed is a whole number from 0 to {SEEDS - 1}, not {self.seed}")

    @property
    def file(self) -> str:
        return file_of(self.contestant.name, self.budget, self.seed)

    @property
    def title(self) -> str:
        return f"{self.contestant.name}, budget {number(self.budget)}, seed {self.seed}"

    def stored(self, results: Path) -> Result | None:
        """Its figures, if they are there, of whatever recipe and code."""
        path = results / self.file
        return load_result(path) if path.is_file() else None

    def done(self, results: Path) -> bool:
        """Whether its figures are there, of this very recipe and code."""
        stored = self.stored(results)
        return stored is not None and stored.code == self.contestant.code

    def prepared(self) -> Recipe | Pipeline:
        """The recipe to train with, which has what stored pairs leave of the budget. ValueError if that pays for too little."""
        left = 1 - PAIRED if self.contestant.paired else 1.0
        return self.contestant.prepared(self.budget * DEMO * left, self.seed)


def run(this: Run, results: Path, folder: Path, *, suite: Suite = SUITE, quiet: bool = False) -> Result:
    """Train and measure, and write the figures to `results`; the student and its clips stay in `folder`.

    FolderInUse if another process runs it, or makes the pairs that it needs.
    """
    place = folder / Path(this.file).stem / this.contestant.code
    with holding(place):
        return _run(this, results, folder, place, suite, quiet)


def _run(this: Run, results: Path, folder: Path, place: Path, suite: Suite, quiet: bool) -> Result:
    began, spent, recipe = time.monotonic(), 0.0, this.prepared()
    if this.contestant.paired:
        recipe, spent = _with_pairs(recipe, this, folder)
    recipe = each(recipe, lambda stage: replace(stage, settings=fitted(stage.settings)))
    made, cost = _trained(recipe, place / "run", began, quiet)
    student = VideoModel.from_pretrained(made)
    rows, floor = _measured(
        student, tuple(n for n in COUNTS if n in student.card.contract.counts), place / FIGURES, suite
    )
    result = Result(
        name=this.contestant.name, method=this.contestant.method, code=this.contestant.code, budget=this.budget,
        seed=this.seed, iterations=sum(stage.settings.steps for stage in stages_of(recipe)), spent=spent + work(recipe),
        **cost, rows=rows, floor=floor, machine=asdict(describe_machine()), versions=versions(),
    )  # fmt: skip
    result.save(results)
    return result


def _trained(recipe: Recipe | Pipeline, place: Path, began: float, quiet: bool) -> tuple[Path, dict[str, float]]:
    """The student's folder, and seconds and peak memory of its training, also if that was complete before.

    What was trained before a stop counts for as long as its logs say.
    """
    made, logs = list[Path](), [read_metrics(path) for path in place.rglob("metrics.jsonl")]
    peak, _ = peak_memory(lambda: made.append(recipe.complete(place, quiet=quiet)))
    if not (place / COST).is_file():
        earlier = sum(rows[-1]["time"] for rows in logs if rows)
        cost = {"seconds": earlier + time.monotonic() - began, "memory_mb": peak / 2**20}
        write_text(place / COST, json.dumps(cost, indent=1) + "\n")
    return made[0], load_json(place / COST, "the cost of a training")


def measure_teacher(results: Path, folder: Path, *, suite: Suite = SUITE) -> Result:
    """The figures of the teacher at its own steps and at those of the students."""
    teacher = VideoModel.from_pretrained("world")
    counts, code = (teacher.card.contract.steps, *COUNTS), teacher_code()
    rows, floor = _measured(teacher, counts, folder / TEACHER / code / FIGURES, suite)
    result = Result(
        name=TEACHER, method="", code=code, budget=0.0, seed=0, iterations=0, spent=0.0,
        seconds=0.0, memory_mb=0.0, rows=rows, floor=floor, machine=asdict(describe_machine()),
        versions=versions(),
    )  # fmt: skip
    result.save(results)
    return result


def figures_of(result: Result) -> Path:
    """Where the evaluation of a run lies in the folder of all runs."""
    return Path(Path(result.file).stem) / result.code / FIGURES


def teacher_measured(results: Path) -> bool:
    path = results / f"{TEACHER}.json"
    return path.is_file() and load_result(path).code == teacher_code()


def _measured(
    model: VideoModel, counts: tuple[int, ...], folder: Path, suite: Suite
) -> tuple[dict[int, Figures], float]:
    """Figures by number of steps, and the distance of rendered clips to others."""
    model = model.prepared(Runtime())
    report = evaluate([Entry(name=str(n), model=model, steps=n) for n in counts], suite, folder)
    return {n: Figures.of(report.row(str(n))) for n in counts}, report.frechet_floor


def _with_pairs(recipe: Recipe | Pipeline, this: Run, folder: Path) -> tuple[Recipe | Pipeline, float]:
    """The recipe with stored pairs, and what they cost."""
    teacher = VideoModel.from_pretrained("world")
    readers = [r for s in stages_of(recipe) for r in s.method.rollouts if isinstance(r, FromPairs)]
    times = sorted(
        {t for reader in readers for grid in exact(reader.grids, reader.shift) for t in grid} | {0.0}, reverse=True
    )
    guidance = CFG(scale=teacher.card.contract.guidance.scale)
    plan = PairPlan(times=tuple(times), steps=PAIR_STEPS, seed=APART * this.seed, guidance=guidance)
    nfe = plan.resolve(teacher.card.contract).nfe
    count = int(this.budget * DEMO * PAIRED / nfe)
    place = folder / f"pairs-{digest([times, count, plan.seed])}"
    made = make_pairs(teacher, world_prompts(count, 0.5, 500 + plan.seed), place, plan, batch=16)

    def reading(stage: Any) -> Any:
        return replace(stage, data=StoredPairs(path=str(made.folder))) if "pairs" in stage.method.needs else stage

    return each(recipe, reading), float(count * nfe)
