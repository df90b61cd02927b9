"""How far a long job is and how fast it goes: a bar for people who watch, a line now and then for files that are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from rich.progress import Progress, TaskID

from fewstep.engine.log import progress_bar

EVERY = 30.0
"""Seconds between lines where there is no terminal."""


class Tell(Protocol):
    """Takes the reports of a job: what is being done, how many are done, of how many."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass
class Pace:
    """Speed since the first report: what an earlier run had done is not counted."""

    first: int
    began: float = field(default_factory=time.monotonic)

    def per_second(self, done: int) -> float:
        return (done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def line(self, what: str, done: int, total: int) -> str:
        speed = self.per_second(done)
        left = f", {timedelta(seconds=round((total - done) / speed))} left" if speed else ""
        return f"{what}: {done:,} of {total:,}, {speed:.3g} per second{left}"


@contextmanager
def telling(quiet: bool) -> Iterator[Tell]:
    """Shows reports on standard error, from the first one on."""
    bar = progress_bar(quiet)
    shown: dict[str, tuple[TaskID, Pace]] = {}
    said = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said
        if not shown:
            bar.start()
        if what not in shown:
            shown[what] = bar.add_task(what, total=total, completed=done, note=""), Pace(done)
            said = time.monotonic()  # there is no speed to tell yet
        task, pace = shown[what]
        bar.update(task, completed=done, note=f"{pace.per_second(done):.3g}/s" if done > pace.first else "")
        if not bar.console.is_terminal and time.monotonic() - said > EVERY:
            said = time.monotonic()
            _say(bar, pace.line(what, done, total))

    try:
        yield tell
    finally:
        bar.stop()


def _say(bar: Progress, line: str) -> None:
    bar.console.print(line, highlight=False, markup=False)
