"""`health.json`: the results of all checks of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.core import build
from fewstep.core.atomic import write_text
from fewstep.engine.health.vitals import Baselines, Verdict, Vitals

FILE = "health.json"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check, its verdict, and the actions taken."""

    vitals: Vitals
    verdict: Verdict
    done: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """All checks of a run, oldest first, and what its student is compared with, by grid."""

    steps: int
    """Planned number of iterations."""
    baselines: dict[str, Baselines]
    checks: tuple[Check, ...] = ()

    @property
    def history(self) -> list[Vitals]:
        return [check.vitals for check in self.checks]

    @property
    def newest(self) -> Baselines:
        """The baselines for the grid of the last check."""
        return self.baselines[self.checks[-1].vitals.grid]

    def with_check(self, check: Check) -> Record:
        return replace(self, checks=(*self.checks, check))

    def tree(self) -> dict[str, Any]:
        """Plain values."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return tree

    @classmethod
    def of(cls, tree: Any) -> Record:
        record: Record = build(cls, tree, {}, FILE)
        return record

    def save(self, folder: Path) -> Path:
        write_text(folder / FILE, json.dumps(self.tree(), indent=1) + "\n")
        return folder / FILE


def read_record(folder: Path | str) -> Record | None:
    """The record in a run's folder; None if the run has had no check."""
    path = Path(folder) / FILE
    return Record.of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
