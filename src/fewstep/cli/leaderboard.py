"""`fewstep leaderboard` with its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides, UsageError


@dataclass(frozen=True)
class Leaderboard(Command):
    """Train every method on the built-in world with the same budget, and write one table and one page.

    A run whose figures are there is not run again, unless its recipe or code has changed. Stopped runs resume."""

    names: Positional[Annotated[tuple[str, ...], arg(metavar="NAME")]] = ()
    """Rows to run: recipes of the folder recipes/leaderboard, or `teacher` (default: all)."""
    budget: tuple[float, ...] = (1.0,)
    """Budgets, in units of what the demo spends on training."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training. Prompts and noise of the figures are the same for all."""
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

        known = leaderboard.contestants()
        if unknown := set(self.names) - set(known) - {leaderboard.TEACHER}:
            raise UsageError(f"no such row: {', '.join(sorted(unknown))}; choose from teacher, {', '.join(known)}")
        wanted = self.names or (leaderboard.TEACHER, *known)
        if leaderboard.TEACHER in wanted and not self.show and not leaderboard.teacher_measured(self.results):
            leaderboard.measure_teacher(self.results, self.runs)
        runs = [
            leaderboard.Run(known[name], budget, seed)
            for budget in self.budget for seed in self.seeds for name in wanted if name in known
        ]  # fmt: skip
        missing = [one for one in runs if not one.done(self.results)]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are there, in {self.results}", flush=True)
        for one in [] if self.show else missing:
            print(one.title, flush=True)
            stored = one.stored(self.results)
            made = leaderboard.run(one, self.results, self.runs, quiet=self.quiet)
            print(f"{made.seconds / 60:.1f} minutes; {leaderboard.summary(made)}", flush=True)
            for line in leaderboard.fallen(stored, made) if stored else []:
                print(f"worse than before: {line}", flush=True)
        results = leaderboard.load_results(self.results)
        print(leaderboard.write_table(results, self.table))
        print(leaderboard.write_page(results, self.runs, self.runs / "leaderboard.html"))
        return 0
