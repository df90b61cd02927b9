"""`fewstep drift`: load the models, measure, write the page, print the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.command import UsageError
from fewstep.cli.commands import _at_steps, _made, _ran
from fewstep.cli.pace import telling
from fewstep.cli.presets import teacher_of
from fewstep.cli.running import runtime_of
from fewstep.cli.screen import screen, table
from fewstep.evaluate.page.drift import said, write_drift_page
from fewstep.evaluate.page.table import number, percent
from fewstep.evaluate.streams import DriftReport, DriftSuite, LongRow, measure_drift, rows_of
from fewstep.models.bundle import VideoModel

if TYPE_CHECKING:
    from fewstep.cli.drift import Drift


def drift(options: Drift) -> int:
    suite = DriftSuite(
        times=options.times, prompts=options.prompts, seeds_per_prompt=options.seeds, seed=options.seed,
        batch=options.batch, features=options.features, switch=not options.no_switch, shown=options.shown,
    )  # fmt: skip
    if not options.students:
        raise UsageError("give at least one STUDENT: a fewstep folder")
    runtime = runtime_of(options, options.students[0])
    students = {
        name: _at_steps(
            VideoModel.from_pretrained(source, trust=options.trust, runtime=runtime), options.num_inference_steps
        )
        for name, source in zip(names(options.students), options.students, strict=True)
    }
    first = next(iter(students.values()))
    _ran(first)
    teacher = teacher_of(first, options.teacher, trust=options.trust)
    causal = None
    if options.causal is not None:
        causal = VideoModel.from_pretrained(options.causal, trust=options.trust, runtime=runtime)
    with telling(options.quiet) as progress:
        report = measure_drift(rows_of(students, teacher, causal), suite, options.output, progress)
    page = write_drift_page(options.output)
    out, times = screen(), options.times
    heads = ("", "calls per frame", *(f"accuracy {n}x" for n in times), f"motion {times[0]}x", f"motion {times[-1]}x")
    out.print(table(heads, [_cells(row, times) for row in report.rows]))
    out.print()
    for line in _lines(report):
        out.print(line, markup=False, soft_wrap=True)
    return _made(page)


def names(sources: Sequence[str]) -> list[str]:
    """A short, different name for each folder: its own, or that of its run."""
    paths = [Path(source) for source in sources]
    short = [path.parent.name if path.name == "student" and path.parent.name else path.name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _cells(row: LongRow, times: Sequence[int]) -> list[str]:
    def at(name: str, n: int) -> float | None:
        values = row.curves[name].values
        return values[n - 1] if n <= len(values) else None

    moved = [at("motion", n) for n in (times[0], times[-1])]
    calls = f"{row.nfe_per_frame:g}" if row.nfe_per_frame else ""
    return [
        row.name, calls, *(percent(at("accuracy", n)) for n in times), *("-" if m is None else number(m) for m in moved)
    ]  # fmt: skip


def _lines(report: DriftReport) -> list[str]:
    """The targets and notes of a report as text."""
    return [*(f"{claim.outcome}: {said(claim)}" for claim in report.claims), *report.notes]
