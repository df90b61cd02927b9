"""Logs of a run: `metrics.jsonl` always, TensorBoard if installed, a progress bar on a terminal."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewstep.core.atomic import write_text

EVERY = 30.0
"""Seconds between two progress lines if standard error is no terminal."""


class Writer(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


@dataclass
class Pace:
    """Speed since the first report; the work of an earlier run, which this one resumes, does not count."""

    first: int
    began: float = field(default_factory=time.monotonic)

    def per_second(self, done: int) -> float:
        return (done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def line(self, what: str, done: int, total: int, note: str = "") -> str:
        speed = self.per_second(done)
        left = f", {timedelta(seconds=round((total - done) / speed))} left" if speed and done < total else ""
        return f"{what}: {done:,} of {total:,}, {figure(speed)} per second{left}{note and f', {note}'}"


def figure(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 1000 else f"{speed:.3g}"


class RunLog:
    """One line per logged iteration: `{"step": 10, "loss/dm": 0.4, ..., "time": seconds since start}`.

    A resumed run drops the lines after its checkpoint, so the file reads as if the run had never stopped. With several
    processes, only the one that `leads` writes and prints.
    """

    def __init__(self, folder: Path, *, resume_step: int, total: int, quiet: bool, leads: bool = True) -> None:
        self.path, self.leads = folder / "metrics.jsonl", leads
        self.progress = progress_bar(quiet or not leads)
        self._task = self.progress.add_task("train", total=total, completed=resume_step, note="")
        self._pace, self._said, self._last = Pace(resume_step), time.monotonic(), ""
        self._total = total
        self._board: Writer | None = None
        if leads:
            self._open(folder, resume_step)

    def _open(self, folder: Path, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._began = time.monotonic() - (kept[-1].get("time", 0.0) if kept else 0.0)
        self._board = _tensorboard(folder / "tensorboard", resume_step)

    def __enter__(self) -> RunLog:
        self.progress.start()
        if self._board is None:
            self.say(f"tensorboard is not installed: figures go to {self.path} only (pip install 'fewstep[track]')")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self._last:  # the whole last line, which the bar may have cut
            self.say(self._last)
        if self._board is not None:
            self._board.close()

    def advance(self, done: int, note: str) -> None:
        self.progress.update(self._task, completed=done, note=note)
        self._last = self._pace.line("steps", done, self._total, note)
        if not self.progress.console.is_terminal and time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.say(self._last)

    def say(self, line: str) -> None:
        """Print one fact for the user."""
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def picture(self, image: Image.Image, path: Path) -> None:
        if self.leads:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

    def write(self, step: int, figures: dict[str, float]) -> None:
        if not self.leads:
            return
        row: dict[str, Any] = {"step": step, **figures, "time": round(time.monotonic() - self._began, 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that is incomplete, because the run was killed, is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress_bar(quiet: bool = False) -> Progress:
    """A bar with counts, elapsed time and time left, on standard error; nothing if that is no terminal."""
    console = Console(stderr=True, quiet=quiet)
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, disable=quiet or not console.is_terminal,
    )  # fmt: skip


def _tensorboard(folder: Path, resume_step: int) -> Writer | None:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from fewstep.engine.board import open_board

    return open_board(folder, resume_step)
