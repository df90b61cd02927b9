"""Health checks of a run in the report: the verdict, curves with two references, and the last picture."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path

from fewstep.engine.health import Record, read_record
from fewstep.engine.health.vitals import unsaid
from fewstep.evaluate.page.svg import curve

CURVES = {
    "accuracy": "Accuracy: share of clips with every attribute right",
    "distance": "Distance to the teacher's clips",
    "heed": "Heed of the prompt (1 = like the teacher, 0 = none)",
    "apart": "Difference from the teacher's clips of the same noise",
    "diversity": "Diversity",
    "motion": "Motion",
    "saturation": "Saturation",
    "contrast": "Contrast",
    "std": "Standard deviation of the latents",
    "drift": "Shift of the latent means, in standard deviations",
}
OWN = {
    "critic": "Critic's error on new samples, relative to the network it started from",
    "lag": "Critic's lag: that error on new samples, relative to old samples",
    "change": "Size of an update relative to the weights",
    "noise": "Noise in the student's training inputs (1 = right)",
    "asked": "Strength of guidance: standard deviation of the guided teacher's predictions, relative to its clips",
    "cosine": "Smallest cosine between gradients of loss terms",
}


def said(run: Path) -> str | None:
    """The last verdict and the actions taken, as HTML; None if the run had no check."""
    record = read_record(run)
    if record is None or not record.checks:
        return None
    last = record.checks[-1]
    done = "".join(f" {escape(what)}." for check in record.checks for what in check.done)
    missing = "".join(f" {escape(what.capitalize())}." for what in unsaid(last.vitals))
    return f"<b>{last.verdict.word}</b> at step {last.vitals.step}: {escape(last.verdict.reason)}.{done}{missing}"


def curves(run: Path) -> list[tuple[str, str]]:
    """Title and chart of every figure with two checks or more."""
    record = read_record(run)
    return [] if record is None or not record.checks else list(_curves(record))


def picture(run: Path) -> str:
    """The picture of the last check as an HTML figure; empty without one."""
    found = sorted((run / "health").glob("*.png"))
    if not found:
        return ""
    data = base64.b64encode(found[-1].read_bytes()).decode()
    caption = (
        f"Step {int(found[-1].stem)}. From left to right: the student at its fewest and at its most steps; what critic and "
        "teacher predict from the student's clips with noise (t = 0.6); the teacher's own clips. Methods without a critic have "
        "no column for it."
    )
    return (
        f'<figure class="card scroll"><img alt="student, critic and teacher" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _curves(record: Record) -> Iterator[tuple[str, str]]:
    grid, lines = record.checks[-1].vitals.grid, record.newest
    same = [vitals for vitals in record.history if vitals.grid == grid]
    for name, title in CURVES.items():
        points = [(float(v.step), getattr(v.looks, name)) for v in same if getattr(v.looks, name) is not None]
        marks = [(getattr(lines.teacher, name), "teacher"), (getattr(lines.untrained, name), "teacher, same steps")]
        if len(points) > 1:
            yield title, curve(*zip(*points), marks=[(value, who) for value, who in marks if value is not None])
    for name, title in OWN.items():
        points = [(float(v.step), getattr(v, name)) for v in same if getattr(v, name) is not None]
        if len(points) > 1:
            yield title, curve(*zip(*points))
