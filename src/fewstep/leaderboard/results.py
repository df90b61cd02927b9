"""Figures of one run as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.core.atomic import write_text
from fewstep.core.bounds import Amount, Fraction, Natural
from fewstep.core.build import build
from fewstep.core.yaml import unique_keys
from fewstep.evaluate.results import Range, Row

TEACHER = "teacher"

COUNTS = (4, 2, 1)
"""Steps of the rows."""
RELATIVE = ("motion", "diversity", "flicker")
"""Figures that the tables show in shares of the teacher's at its own steps."""
DIVISORS = ("accuracy", "frechet", *RELATIVE)
"""The teacher's figures that others are divided by."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One student, or the teacher, at one number of steps, on the clips that all rows share. Not relative to anything."""

    accuracy: Fraction
    accuracy_ci: Range
    frechet: Amount
    frechet_ci: Range | None
    motion: Amount
    diversity: Amount
    flicker: Amount

    @classmethod
    def of(cls, row: Row) -> Figures:
        """Of a row of an evaluation on the built-in world."""
        figures = {
            "accuracy": row.accuracy, "accuracy_ci": row.accuracy_ci, "frechet": row.frechet,
            "motion": row.motion_absolute, "diversity": row.diversity_absolute, "flicker": row.flicker_absolute,
        }  # fmt: skip
        assert all(value is not None for value in figures.values()), (
            f"{row.name} was not measured on the built-in world"
        )
        return cls(**figures, frechet_ci=row.frechet_ci)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run and its figures."""

    name: str
    """Name of the recipe in `recipes/leaderboard`, or `teacher`."""
    method: str
    code: str
    """`Contestant.code` of the run: of what was run."""
    budget: Amount
    """In units of the demo's budget; 0: nothing was trained."""
    seed: Natural
    iterations: Natural
    """Of all stages."""
    spent: float
    """Forward-equivalents, stored pairs included."""
    seconds: float
    """Time of training, with pairs and probes, without figures; of what came before a stop, the part that its logs tell, without
    pairs."""
    memory_mb: float
    """Peak memory of the process while it trained."""
    rows: Mapping[int, Figures]
    """Figures by number of steps."""
    floor: float
    """Frechet distance between two sets of rendered clips of these prompts: that of a perfect model."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def file(self) -> str:
        return file_of(self.name, self.budget, self.seed)

    @property
    def most(self) -> Figures:
        """Figures at the most steps: of the teacher, what `RELATIVE` are relative to."""
        return self.rows[max(self.rows)]

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / self.file, json.dumps(asdict(self), indent=1) + "\n")
        return folder / self.file


def summary(result: Result) -> str:
    """Accuracy and distance at each number of steps, in one line."""
    return ", ".join(f"{n} steps {row.accuracy:.2f} / {row.frechet:.2f}" for n, row in result.rows.items())


def file_of(name: str, budget: float, seed: int) -> str:
    """The file of a run: every run has one of its own, so that a table can grow on several machines."""
    return f"{name}-{number(budget)}-{seed}.json" if budget else f"{name}.json"


def number(budget: float) -> str:
    """A budget in names and titles: all its digits, so that two budgets have two names.

    >>> number(1.0), number(0.0004), number(1.0000001)
    ('1', '0.0004', '1.0000001')
    """
    return repr(float(budget)).removesuffix(".0")


def load_result(path: Path) -> Result:
    """One run. ValueError for a file that cannot be read as one, or that has another run's name."""
    again = f"Delete it and run the row again: fewstep leaderboard {path.stem.partition('-')[0]}"
    try:
        result = build(Result, json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys), at="result")
        result = replace(result, rows={int(steps): row for steps, row in result.rows.items()})
        if few := [steps for steps in result.rows if steps < 1]:
            raise ValueError(f"a number of steps must be at least 1, got {few[0]}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {again}") from None
    if not result.rows:
        raise ValueError(f"{path} has no figures. {again}")
    if path.name != result.file:
        raise ValueError(
            f"{path} has the figures of {result.file}, and a copy would count as another run. Delete it, or give it that name"
        )
    lacking = [name for name in DIVISORS if not getattr(result.most, name)]
    if result.name == TEACHER and (lacking or max(result.rows) <= max(COUNTS)):
        raise ValueError(
            f"{path} lacks the teacher's {', '.join(lacking or DIVISORS)} at its own steps, by which others are divided. {again}"
        )
    return result


def load_results(folder: Path) -> list[Result]:
    """All runs in a folder. Hidden files are none: a process that was killed may have left its draft."""
    return [load_result(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
