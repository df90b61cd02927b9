"""Progress and speed of a long job: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import Progress, TaskID

from fewstep.engine.log import EVERY, Pace, figure, progress_bar


class Tell(Protocol):
    """Receives reports of a job: its name, how many items are done, how many there are, and a note."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def telling(quiet: bool) -> Iterator[Tell]:
    """Show reports on standard error, from the first one on; without a terminal, show the speed too, and last where each job
    ended (after an error its message says that)."""
    bar = progress_bar(quiet)
    shown: dict[str, tuple[TaskID, Pace]] = {}
    last: dict[str, str] = {}
    said = time.monotonic()

    def tell(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal said
        if not shown:
            bar.start()
        if what not in shown:
            shown[what] = bar.add_task(what, total=total, completed=done, note=note), Pace(done)
            said = time.monotonic()  # there is no speed to report yet
        task, pace = shown[what]
        if done > pace.first:
            last[what] = pace.line(what, done, total, note)
        speed = f"{figure(pace.per_second(done))}/s" if done > pace.first else ""
        bar.update(task, completed=done, note=f"{speed} {note}".strip())
        if not bar.console.is_terminal and time.monotonic() - said > EVERY:
            said = time.monotonic()
            _say(bar, pace.line(what, done, total, note))

    try:
        yield tell
    finally:
        bar.stop()
    for line in last.values() if not bar.console.is_terminal else ():
        _say(bar, line)


def _say(bar: Progress, line: str) -> None:
    bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
