"""`fewstep watch`: a live view of a run, with verdict, figures, two reference columns and losses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from fewstep.cli.screen import screen, table
from fewstep.engine.health import Record, read_record
from fewstep.engine.health.vitals import Looks, unsaid
from fewstep.engine.log import read_metrics
from fewstep.models.results import result_in

COLOURS = {
    "improving": "bold green", "unclear": "bold", "stalled": "bold yellow", "diverging": "bold red", "collapsing": "bold red",
}  # fmt: skip
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Characters of a curve."""
SHOWN = ("accuracy", "distance", "heed", "apart", "diversity", "motion", "saturation", "contrast", "std", "drift")
OTHERS = ("critic", "lag", "noise", "asked", "change", "coarse", "cosine")


def show(folder: Path, *, every: float) -> int:
    """Print once; on a terminal, until the run has ended. For a recipe with stages, show its latest stage."""
    stages = [path.parent for path in folder.glob("*-*/metrics.jsonl")]
    folder = max(stages, key=lambda stage: int(stage.name.partition("-")[0])) if stages else folder
    check(folder)
    out = screen()
    if not (out.is_terminal and every > 0):
        out.print(view(folder))
        return 0
    with Live(view(folder), console=out, auto_refresh=False) as live:
        while not ended(folder):
            time.sleep(every)
            live.update(view(folder), refresh=True)
        live.update(view(folder), refresh=True)
    return 0


def check(folder: Path) -> None:
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no metrics.jsonl. Give the output folder of a run.")


def ended(folder: Path) -> bool:
    """Whether the run has ended: it writes its result last."""
    return result_in(folder) is not None


def view(folder: Path) -> RenderableType:
    """The current view of a run."""
    rows, record = read_metrics(folder / "metrics.jsonl"), read_record(folder)
    parts: list[RenderableType] = [Text(progress(folder, rows, record))]
    if record is not None and record.checks:
        last = record.checks[-1]
        verdict = Text(last.verdict.word, style=COLOURS[last.verdict.word])
        parts.append(verdict + Text(f" at step {last.vitals.step}: {last.verdict.reason}", style="default"))
        parts += [Text(f"  {what}", style="bold") for what in last.done]
        parts += [Text(f"  {what}", style="dim") for what in unsaid(last.vitals)]
        heads = ("\nhealth", "now", "", "teacher", "teacher, same steps", "before training")
        parts.append(table(heads, figures(record)))
    else:
        parts.append(Text("no health check yet (see settings.health; a run shorter than its interval has none)"))
    parts.append(table(("\nlosses", "now", ""), losses(rows)))
    return Group(*parts)


def progress(folder: Path, rows: Sequence[dict[str, Any]], record: Record | None) -> str:
    """Step, speed and remaining time in one line."""
    if not rows:
        return f"{folder}: nothing logged yet"
    step, seconds = rows[-1]["step"], rows[-1]["time"]
    total = f" of {record.steps}" if record is not None else ""
    said = f"{folder}: step {step}{total}, {seconds:.0f} s, {seconds / max(step, 1):.2f} s an iteration"
    if ended(folder):
        return said + ", ended"
    left = f", {(record.steps - step) * seconds / max(step, 1):.0f} s left" if record is not None else ""
    return said + left


def figures(record: Record) -> Iterator[tuple[str, ...]]:
    """One row per figure: its value, its curve, and the values to compare with. Curves show checks of the newest grid."""
    now = record.checks[-1].vitals
    same = [vitals for vitals in record.history if vitals.grid == now.grid]
    references: tuple[Looks, ...] = (record.newest.teacher, record.newest.untrained, record.newest.start)
    for name in SHOWN:
        values = [getattr(vitals.looks, name) for vitals in same]
        if values[-1] is not None:
            yield name, _number(values[-1]), spark(values), *(_number(getattr(looks, name)) for looks in references)
    for name in OTHERS:
        values = [getattr(vitals, name) for vitals in same]
        if values[-1] is not None:
            yield name, _number(values[-1]), spark(values), "", "", ""
    for role in now.moved:
        yield f"{role} moved", f"{now.moved[role]:.0%}", spark([v.moved.get(role) for v in same]), "", "", ""
    if len(now.looks.by_frame) > 1:
        frames = (looks.by_frame for looks in (now.looks, *references))
        first, *others = (f"{ends[0]:.2f} to {ends[-1]:.2f}" for ends in frames)
        yield "std, first to last frame", first, spark(now.looks.by_frame), *others


def losses(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """One row per loss. A distillation loss need not fall."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(("loss/", "grad/")))
    for name in names:
        values = [row[name] for row in rows if name in row]
        yield name, _number(values[-1]), spark(values)


def spark(values: Sequence[float | None]) -> str:
    """A curve in one line of text, from means over equal intervals, scaled from the lowest to the highest value.

    >>> spark([0.0, 1.0, 2.0, 3.0])
    '▁▃▆█'
    """
    some = [value for value in values if value is not None]
    width = min(WIDTH, len(some))
    cuts = [round(i * len(some) / width) for i in range(width + 1)] if width else []
    means = [sum(some[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((m - low) / span * (len(BARS) - 1)) if span > 0 else 0] for m in means)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
