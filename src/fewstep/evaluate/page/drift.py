"""The page of a drift evaluation: targets, film strips with the worst drift first, figures by window, switched prompts."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fewstep.core.atomic import write_text
from fewstep.evaluate.page.svg import Line, lines
from fewstep.evaluate.page.table import number, percent
from fewstep.evaluate.page.template import page
from fewstep.evaluate.streams.figures import Curve, Range
from fewstep.evaluate.streams.results import STRIPS, Claim, DriftReport, LongRow, load_drift
from fewstep.evaluate.streams.rolling import shown_windows
from fewstep.evaluate.streams.switching import Switch
from fewstep.world.grammar import ATTRIBUTES

FILE = "drift.html"
CHARTS = ("accuracy", "same object", "Frechet", "motion", "saturation", "sharpness", "brightness", "flicker")
SHARES = ("accuracy", "same object")
Text = Callable[[float], str]


def write_drift_page(folder: Path | str) -> Path:
    """Write `drift.html` next to the `results.json` in `folder`. The page needs no other file and no network."""
    folder = Path(folder)
    report = load_drift(folder)
    strips = load_file(folder / STRIPS) if (folder / STRIPS).is_file() else {}
    last, seconds = report.suite["times"][-1], report.frames / report.fps
    students = [row.name for row in report.rows if row.role == "student"]
    body = [
        _claims(report),
        _cases(report, strips),
        _table(report),
        _charts(report),
        _switches(report),
        _method(report),
    ]
    text = page(
        "drift.html",
        title=escape(f"Does it drift? {', '.join(students)} at {last} times the clip length"),
        lead=escape(
            f"{len(report.prompts)} clips per row, {last} windows of {report.frames} frames ({seconds:g} s) each; every window "
            "is measured on its own."
        ),
        columns=str(max((x.shape[1] for x in strips.values()), default=1)),
        body="\n".join(filter(None, body)),
    )
    path = folder / FILE
    write_text(path, text)
    return path


def worst_first(report: DriftReport) -> list[int]:
    """Clips in the order of the share of windows that are right, in the students' rows: the worst first."""
    rows = [row for row in report.rows if row.role == "student"] or list(report.rows)
    shares = [min(sum(row.right[i]) / len(row.right[i]) for row in rows) for i in range(len(report.prompts))]
    return sorted(range(len(shares)), key=shares.__getitem__)


def kind_of(report: DriftReport, row: LongRow) -> str:
    """The CSS class of a row's colour."""
    return "real" if row.role == "real" else f"l{min(report.rows.index(row), 5)}"


def _claims(report: DriftReport) -> str:
    items = "".join(
        f'<li><span class="{one.outcome.replace(" ", "")}">{one.outcome}</span><span>{escape(said(one))}</span></li>'
        for one in report.claims
    )
    hint = (
        "Met, or not met: the whole 95 % interval is within the bounds, or beyond them. Open: more prompts would tell."
    )
    return _section("Targets", hint, f'<div class="card"><ul class="claims">{items}</ul></div>') if items else ""


def said(claim: Claim) -> str:
    """A claim as one line of text."""
    value = "undefined, because it is relative to 0" if claim.value is None else f"{claim.value:.2f}"
    ends = "" if claim.interval is None else f" [{claim.interval[0]:.2f}, {claim.interval[1]:.2f}]"
    wanted = f"at least {claim.low:g}" if claim.high is None else f"{claim.low:g} to {claim.high:g}"
    return f"{claim.row}: {claim.text}: {value}{ends}, wanted {wanted}"


def _cases(report: DriftReport, strips: Mapping[str, Tensor]) -> str:
    seeds = report.suite["seeds_per_prompt"]
    firsts = [clip for clip in worst_first(report) if clip % seeds == 0][: report.suite["shown"]]
    boxes = "".join(_case(report, strips, clip, clip // seeds) for clip in firsts)
    hint = (
        "The prompts whose student's windows are wrong most often, not a fair sample. Four frames of each window. Green: every "
        "attribute is right in this window; red: not."
    )
    return _section("Film strips, worst drift first", hint, boxes) if strips else ""


def _case(report: DriftReport, strips: Mapping[str, Tensor], clip: int, prompt: int) -> str:
    every = shown_windows(report.suite["times"][-1], tuple(report.suite["times"]))
    seconds = report.frames / report.fps
    cells = ['<span class="head"></span>']
    cells += [f'<span class="head">{w + 1}x: from {w * seconds:g} s</span>' for w in every]
    for row in report.rows:
        cells.append(f'<span class="who">{escape(row.name)}</span>')
        shown = len(row.right[clip])
        for place, window in enumerate(every):
            if window >= shown:
                cells.append('<span class="none">new clip each window</span>' if place == 1 else "<span></span>")
                continue
            right = "right" if row.right[clip][window] else "wrong"
            image = _png(strips[row.name][prompt, place])
            alt = escape(f"{row.name}, window {window + 1}: {right}")
            cells.append(f'<figure class="{right}"><img alt="{alt}" src="data:image/png;base64,{image}"></figure>')
    return (
        f'<article class="card case scroll"><h3>“{escape(report.prompts[clip])}”</h3>'
        f'<div class="strips">{"".join(cells)}</div></article>'
    )


def _png(frames: Tensor) -> str:
    """Frames `[3, S, h, w]`, uint8, side by side, as base64 PNG."""
    apart = functional.pad(frames, (0, 1), value=255).permute(2, 1, 3, 0).flatten(1, 2)[:, :-1]
    file = io.BytesIO()
    Image.fromarray(apart.contiguous().to(torch.uint8).numpy()).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def _table(report: DriftReport) -> str:
    times = report.suite["times"]
    last = times[-1]
    heads = ["", "calls<br>per frame", *(f"accuracy<br>at {n}x" for n in times), f"accuracy kept<br>at {last}x"]
    heads += [f"same object<br>at {last}x", "motion<br>at 1x", f"motion kept<br>at {last}x"]
    heads += ["Frechet<br>at 1x", f"Frechet<br>at {last}x"]
    first = _grid(heads, [_figures(row, times) for row in report.rows])
    moving = [row for row in report.rows if row.curves["motion"].slope is not None]
    names = [name for name in CHARTS if any(name in row.curves for row in moving)]
    slopes = [[escape(row.name), *(_slope(row.curves.get(name), name in SHARES) for name in names)] for row in moving]
    attributes = [[escape(row.name), *(_ends(row.curves[name]) for name in ATTRIBUTES)] for row in report.rows]
    hint = "95 % intervals over prompts below each figure. Kept: mean of the last window over mean of the first."
    drift = "Change of each figure per 100 frames: least-squares slope over the windows. Models of whole clips have one window."
    return "".join((
        _section("Figures", hint, f'<div class="card scroll">{first}</div>'),
        _section("Drift per 100 frames", drift, f'<div class="card scroll">{_grid(["", *names], slopes)}</div>'),
        _section(
            "Attributes", f"Share of clips in which each attribute is right, in the first window and at {last}x.",
            f'<div class="card scroll">{_grid(["", *ATTRIBUTES], attributes)}</div>',
        ),
    ))  # fmt: skip


def _figures(row: LongRow, times: Sequence[int]) -> list[str]:
    accuracy, motion, last = row.curves["accuracy"], row.curves["motion"], times[-1]
    cells = [escape(row.name), f"{row.nfe_per_frame:g}" if row.nfe_per_frame else ""]
    cells += [*(_at(accuracy, n, percent) for n in times), _kept(accuracy, last)]
    cells += [_at(row.curves["same object"], last, percent), _at(motion, 1, number), _kept(motion, last)]
    return [*cells, *(_at(row.curves.get("Frechet"), n, number) for n in (1, last))]


def _ends(curve: Curve) -> str:
    """First and last window of a share."""
    first, last = percent(curve.values[0]), percent(curve.values[-1])
    return first if len(curve.values) == 1 else f"{first} &rarr; {last}"


def _at(curve: Curve | None, times: int, text: Text) -> str:
    if curve is None or times > len(curve.values):
        return ""
    return text(curve.values[times - 1]) + _small(curve.intervals[times - 1], text)


def _kept(curve: Curve, times: int) -> str:
    one = next((k for k in curve.kept if k.times == times), None)
    if one is None or one.ratio is None:
        return ""
    return f"{one.ratio:.2f}x" + _small(one.interval, lambda x: f"{x:.2f}")


def _slope(curve: Curve | None, share: bool) -> str:
    if curve is None or curve.slope is None:
        return ""

    def text(value: float) -> str:
        return f"{round(100 * value, 1) + 0.0:+.1f} pt" if share else f"{value:+.2g}"  # no -0.0

    return text(curve.slope) + _small(curve.slope_interval, text)


def _small(interval: Range | None, text: Text) -> str:
    return "" if interval is None else f"<small>[{text(interval[0])}, {text(interval[1])}]</small>"


def _charts(report: DriftReport) -> str:
    legend = "".join(
        f'<span><i class="key {kind_of(report, row)}{" level" if row.kind == "new clips" else ""}"></i>{escape(row.name)}</span>'
        for row in report.rows
    )
    cards = "".join(_chart(report, name) for name in CHARTS if any(name in row.curves for row in report.rows))
    hint = "Each point is one window. Bands: 95 % intervals over prompts. Dashed: models of whole clips, which cannot drift."
    return _section("By window", hint, f'<div class="legend">{legend}</div><div class="charts">{cards}</div>')


def _chart(report: DriftReport, name: str) -> str:
    items = [
        Line(
            row.name, [report.frames * w / report.fps for w in range(len(row.curves[name].values))], row.curves[name].values,
            kind_of(report, row), row.curves[name].intervals,
        )
        for row in report.rows if name in row.curves
    ]  # fmt: skip
    share = name in SHARES
    drawn = lines(items, x_name="seconds", text=percent if share else number, top=1.0 if share else None)
    return f'<div class="card"><h3>{escape(name)}</h3>{drawn}</div>'


def _switches(report: DriftReport) -> str:
    if not report.switches:
        return ""
    heads = [
        "",
        "changed",
        "how",
        "right before",
        "becomes right",
        "frames until right",
        "same object",
        "what does not change stays right",
    ]
    rows = [[escape(one.row), one.kind, escape(one.how), *_switched(one)] for one in report.switches]
    hint = (
        "The prompt is switched after one clip length, at a chunk. Becomes right: from some frame to the end, every attribute of "
        "the second prompt is right. Frames until right: median over clips, in steps of 4 frames. The last two columns: share "
        "of the clips that were right before the switch. A stream that cannot be switched in some way has no row for it."
    )
    return _section("Switched prompts", hint, f'<div class="card scroll">{_grid(heads, rows)}</div>')


def _switched(one: Switch) -> list[str]:
    frames = "never" if one.frames is None else f"{one.frames:g}" + _small(one.frames_interval, lambda x: f"{x:g}")
    stays = ", ".join(f"{escape(name)}&nbsp;{percent(share)}" for name, share in one.survived.items()).replace(
        " %", "&nbsp;%"
    )
    right = percent(one.right) + _small(one.right_interval, percent)
    return [percent(one.right_before), right, frames, percent(one.same_object), f'<span class="long">{stays}</span>']


def _method(report: DriftReport) -> str:
    facts = {
        "prompts and seeds": f"{len(report.prompts)} clips of {report.suite['prompts']} prompts, seed {report.suite['seed']}",
        "features": report.features,
        "Frechet": "to independent rendered clips of the same prompts, in the same window; the row of real clips is the floor",
        "models": ", ".join(f"{name}: {print_}" for name, print_ in report.models.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in report.machine.items() if value is not None),
        "versions": ", ".join(f"{name} {value}" for name, value in report.versions.items()),
        "how they ran": ", ".join(f"{name}: {value}" for name, value in report.runtime.items()),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return _section("Method", "", f'<div class="card"><ul class="notes">{notes}</ul><dl>{listed}</dl></div>')


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its texts are HTML."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, hint: str, body: str) -> str:
    said = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"
