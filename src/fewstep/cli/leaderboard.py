"""`fewstep leaderboard` with its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides, UsageError

if TYPE_CHECKING:
    from fewstep.leaderboard import Run


@dataclass(frozen=True)
class Leaderboard(Command):
    """Train every method on the built-in world with the same budget, and write one table and one page.

    A run whose figures are there is not run again, unless its recipe or code has changed. Stopped runs resume. Several processes
    can share the rows. The teacher is measured first if its figures are missing."""

    names: Positional[Annotated[tuple[str, ...], arg(metavar="NAME")]] = ()
    """Rows to run: recipes of the folder recipes/leaderboard, or `teacher` (default: all)."""
    budget: tuple[float, ...] = (1.0,)
    """Budgets, in units of what the demo spends on training: above 0, at most 1000."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training, from 0 to 999. Prompts and noise of the figures are the same for all."""
    results: Path = Path("bench/leaderboard")
    """Folder of the figures: one JSON file per run."""
    runs: Path = Path("runs/leaderboard")
    """Folder of the runs, with students and clips."""
    table: Path = Path("docs/leaderboard.md")
    """Markdown file to write."""
    show: bool = False
    """Run nothing; write the table and the page from the figures that are there."""
    quiet: bool = False
    """Hide the progress of the runs."""

    def run(self, overrides: Overrides) -> int:
        from fewstep import leaderboard
        from fewstep.core.atomic import require_writable

        runs, page = self._runs(), self.runs / "leaderboard.html"
        for path in (self.table, page) if self.show else (self.results / "any.json", self.table, page):
            require_writable(path)  # or this is an error after hours, too
        leaderboard.load_results(self.results)  # a damaged file is an error now, not after hours
        missing = [one for one in runs if not one.done(self.results)]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are there, in {self.results}", flush=True)
        if self.show and not (self.results / f"{leaderboard.TEACHER}.json").is_file():
            raise UsageError(f"{self.results} has no figures of the teacher; run fewstep leaderboard teacher")
        if not self.show:
            self._run(missing)
        results = leaderboard.load_results(self.results)
        print(leaderboard.write_table(results, self.table))
        print(leaderboard.write_page(results, self.runs, page))
        return 0

    def _runs(self) -> list[Run]:
        """What was asked for, each run once. UsageError for a row, a budget or a seed that does not exist."""
        from fewstep import leaderboard

        known = leaderboard.contestants()
        for option, given in (("--budget", self.budget), ("--seeds", self.seeds)):
            if not given:
                raise UsageError(f"{option} has no value; give at least one, or leave it out")
        if unknown := sorted(set(self.names) - set(known) - {leaderboard.TEACHER}):
            raise UsageError(f"no such row: {', '.join(unknown)}; {_instead(unknown[0], known)}")
        names = [name for name in self.names or known if name in known]
        try:
            runs = [
                leaderboard.Run(known[name], budget, seed)
                for budget in self.budget for seed in self.seeds for name in names
            ]  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from None
        return list({one.file: one for one in runs}.values())

    def _run(self, missing: Sequence[Run]) -> None:
        """Run what is missing, after a check of all of it."""
        from fewstep import leaderboard

        for one in missing:
            try:
                one.prepared()
            except ValueError as error:
                raise UsageError(f"{one.title}: {error}") from error
        if not leaderboard.teacher_measured(self.results):
            leaderboard.measure_teacher(self.results, self.runs)
        for one in missing:
            if not one.done(self.results):  # another process may have run it
                self._run_one(one)

    def _run_one(self, one: Run) -> None:
        from fewstep import leaderboard
        from fewstep.core.lock import FolderInUse

        print(one.title, flush=True)
        stored = one.stored(self.results)
        teacher = leaderboard.load_result(self.results / f"{leaderboard.TEACHER}.json")
        try:
            made = leaderboard.run(one, self.results, self.runs, quiet=self.quiet)
        except FolderInUse as error:
            print(f"left to another process, which runs this row or makes its pairs: {error}", flush=True)
            return
        print(f"{made.seconds / 60:.1f} minutes; {leaderboard.summary(made)}", flush=True)
        for line in leaderboard.fallen(stored, made, teacher) if stored else []:
            print(f"worse than before: {line}", flush=True)


def _instead(name: str, known: Iterable[str]) -> str:
    """What to write instead of a row that does not exist: the switches of its base, the row that is most like it, or any."""
    from fewstep.leaderboard import JOINED, TEACHER

    rows = [TEACHER, *known]
    base = name.partition(JOINED)[0]
    if JOINED in name and base in rows:
        return f"choose from {', '.join(row for row in rows if row.partition(JOINED)[0] == base)}"
    near = get_close_matches(name.rpartition("/")[2], rows, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(rows)}"
