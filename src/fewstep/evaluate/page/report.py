"""One self-contained HTML page from an evaluation's folder: clips side by side, figures, charts, protocol."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.atomic import write_text
from fewstep.engine.log import read_metrics
from fewstep.evaluate.page import health
from fewstep.evaluate.page.animate import fitted, gif_bytes
from fewstep.evaluate.page.earned import unearned
from fewstep.evaluate.page.svg import Bar, Point, bars, curve, scatter
from fewstep.evaluate.page.table import between, ends, number, percent, score, times, truth_cells
from fewstep.evaluate.page.template import page
from fewstep.evaluate.results import CLIPS, Range, Report, Row, load_report

FILE = "report.html"
LARGEST = 256
"""Longest side of a clip on the page; larger ones are scaled down."""


def write_report(folder: Path | str, *, run: Path | str | None = None, recipe: str | None = None) -> Path:
    """Write `report.html` next to the `results.json` in `folder`. The page needs no other file and no network.

    `run` is a training run whose `metrics.jsonl` is drawn as curves, `recipe` the text of the recipe that made the
    student.
    """
    folder = Path(folder)
    report = load_report(folder)
    clips = load_file(folder / CLIPS) if (folder / CLIPS).is_file() else {}
    sections = [_clips(report, clips), _table(report), _charts(report), _attributes(report)]
    if run is not None:
        sections += [_health(Path(run)), _curves(Path(run))]
    sections += [_method(report), _provenance(report, recipe)]
    hero = best_student(report)
    text = page(
        "report.html",
        title=escape(f"{hero.model}: few-step report" if hero else "fewstep report"),
        lead=escape(lead(report, hero)),
        facts="".join(
            f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in _facts(report, hero)
        ),
        columns=str(max(1, len(clips))),
        body="\n".join(sections),
    )
    path = folder / FILE
    write_text(path, text)
    return path


def best_student(report: Report) -> Row | None:
    """The student row with the highest accuracy (or the smallest distance); among equals, the one with fewest steps."""
    students = [row for row in report.rows if row.role == "student"]
    return min(students, key=lambda r: (-(r.accuracy or 0.0), r.frechet or 0.0, r.steps), default=None)


def lead(report: Report, hero: Row | None) -> str:
    """The outcome in a few plain sentences, good or bad."""
    if hero is None:
        return "This page has no student: it shows the teacher at several numbers of steps."
    doubt = unearned(report, hero)
    return _outcome(report, hero) + (f" The quality of {hero.name} has not been shown: {doubt}." if doubt else "")


def _outcome(report: Report, hero: Row) -> str:
    reference = report.row(report.reference)
    if hero.accuracy is None and report.aligned:
        same = (
            f" {hero.gain.baseline}, without training: {_alignment(report.row(hero.gain.baseline), report)}."
            if hero.gain
            else ""
        )
        return (
            f"{hero.name}, with {_evaluations(hero)} per clip: {_alignment(hero, report)}. {reference.name}, with "
            f"{reference.nfe}: {_alignment(reference, report)}.{same} These figures do not measure flicker: look at the "
            "clips too."
        )
    if hero.accuracy is None:
        return (
            f"{hero.name} makes a clip with {_evaluations(hero)}, {reference.name} with {reference.nfe}. "
            "Only prompts of the built-in world can be checked automatically: look at the clips and the distances."
        )
    said = (
        f"{hero.name} uses {_evaluations(hero)} per clip, and {percent(hero.accuracy)} of its clips show everything that the "
        f"prompt asks for. {reference.name} uses {reference.nfe}: {percent(reference.accuracy)}."
    )
    gain = hero.gain
    if gain is None or gain.accuracy is None:
        return said + " The teacher at the same number of steps was not measured, so the gain from training is unknown."
    same = f" The teacher at the same number of steps, without training: {percent(report.row(gain.baseline).accuracy)}."
    if gain.accuracy_ci is None:
        return said + same + " One prompt says nothing about other prompts."
    low, high = gain.accuracy_ci
    verdict = (
        "" if low > 0 else " Training made it worse." if high < 0 else " This difference is within the margin of error."
    )
    return said + same + verdict


def _alignment(row: Row, report: Report) -> str:
    far = "" if row.frechet is None else f" and {report.distance} {number(row.frechet)}"
    return f"CLIPScore {score(row.clip_score)}{far}"


def _evaluations(row: Row) -> str:
    return f"{row.nfe} network evaluation" + ("s" if row.nfe != 1 else "")


def _facts(report: Report, hero: Row | None) -> Iterator[tuple[str, str]]:
    reference = report.row(report.reference)
    if hero is None:
        return
    if doubt := unearned(report, hero):
        yield "not shown", f"quality of {hero.name}: {doubt}. So this page claims no speed-up"
    else:
        faster = f"{number(reference.seconds / hero.seconds)}x faster"
        yield faster, f"{_time(hero.seconds)} per clip instead of {_time(reference.seconds)}"
    if hero.accuracy is not None:
        yield (
            percent(hero.accuracy),
            f"of the clips match their prompt; {reference.name}: {percent(reference.accuracy)}",
        )
    if doubt:
        return  # pure noise has much motion and diversity
    if hero.motion is not None:
        yield times(hero.motion), f"the motion of {reference.name}"
    if hero.diversity is not None:
        yield times(hero.diversity), f"the diversity of {reference.name}"


def _clips(report: Report, clips: Mapping[str, Tensor]) -> str:
    if not clips:
        return ""
    names = [row.name for row in report.rows if row.name in clips]
    small = {name: fitted(clips[name], LARGEST) for name in names}
    cells = []
    for i, preview in enumerate(report.previews):
        cells.append(
            f'<p class="prompt">“{escape(preview["prompt"])}” <span class="soft">seed {preview["seed"]}</span></p>'
        )
        cells.extend(_cell(name, small[name][i], preview, report.suite["fps"]) for name in names)
    hint = "Each line has one prompt and one seed, so all its clips start from the same noise."
    if any(preview["marks"] for preview in report.previews):
        hint += " The checker reads each attribute from the pixels: ✓ as the prompt asks, ✗ different, ? too unclear to read."
    return _section("Side by side", hint, f'<div class="card scroll"><div class="clips">{"".join(cells)}</div></div>')


def _cell(name: str, clip: Tensor, preview: Mapping[str, Any], fps: float) -> str:
    picture = base64.b64encode(gif_bytes(clip, fps)).decode()
    large = ' class="large"' if max(clip.shape[-2:]) > 64 else ""
    marks = (preview["marks"] or {}).get(name, {})
    tally = f"{sum(m == 'right' for m in marks.values())}/{len(marks)}" if marks else ""
    items = "".join(f'<li class="{mark}">{escape(attribute)}</li>' for attribute, mark in marks.items())
    who = f'<span class="who"><span>{escape(name)}</span><span>{tally}</span></span>'
    return (
        f'<figure><img{large} alt="{escape(name)}: {escape(preview["prompt"])}" src="data:image/gif;base64,{picture}">'
        f"<figcaption>{who}<ul>{items}</ul></figcaption></figure>"
    )


def _table(report: Report) -> str:
    scores = {"accuracy": report.checked or not report.aligned, "CLIPScore": report.aligned}
    heads = ["", "network<br>evaluations"]
    heads += [head for name, shown in scores.items() if shown for head in (name, "minus teacher<br>at equal steps")]
    heads += [report.distance, "motion", "diversity", "flicker", "seconds<br>median / p95", "decode<br>seconds"]
    heads += ["GFLOP", "memory<br>MB"]
    lines = [_table_line(_row_cells(row, report), kind(row, report)) for row in report.rows]
    if report.truth is not None:
        cells = truth_cells(report.truth, report)
        lines.append(_table_line([*cells, *[""] * (len(heads) - len(cells))], "truth"))
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    hint = f"{report.seeds['clips']} clips per row. Brackets are 95 % intervals. "
    hint += f"Motion, diversity and flicker are relative to {escape(report.reference)}."
    return _section("Figures", hint, f'<div class="card scroll">{table}</div>')


def _table_line(cells: Sequence[str], kind: str) -> str:
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _row_cells(row: Row, report: Report) -> list[str]:
    gain, scores = row.gain, []
    if report.checked or not report.aligned:
        against = (
            "" if gain is None else _gained(gain.accuracy, gain.accuracy_ci, lambda share: f"{100 * share:+.0f}", " pt")
        )
        scores += [f"{percent(row.accuracy)} <small>{between(row.accuracy_ci)}</small>", against]
    if report.aligned:
        against = "" if gain is None else _gained(gain.clip_score, gain.clip_score_ci, lambda points: f"{points:+.1f}")
        scores += [f"{score(row.clip_score)} <small>{ends(row.clip_score_ci, score)}</small>", against]
    far = "" if row.frechet is None else f"{number(row.frechet)} <small>{ends(row.frechet_ci, number)}</small>"
    return [
        escape(row.name),
        str(row.nfe),
        *scores,
        far or "<small>reference</small>",
        times(row.motion),
        times(row.diversity),
        times(row.flicker),
        f"{number(row.seconds)} <small>/ {number(row.seconds_p95)}</small>",
        number(row.seconds_decode),
        "" if row.flops is None else number(row.flops / 1e9),
        f"{row.memory_mb:,.0f}",
    ]


def _gained(value: float | None, interval: Range | None, text: Callable[[float], str], unit: str = "") -> str:
    if value is None:
        return ""
    return f"{text(value)}{unit}" + ("" if interval is None else f" <small>{ends(interval, text)}</small>")


def kind(row: Row, report: Report) -> str:
    """CSS class of a row."""
    return "student" if row.role == "student" else "reference" if row.name == report.reference else "baseline"


def _charts(report: Report) -> str:
    rows, cards = report.rows, []
    if all(row.accuracy is not None for row in rows):
        items = [Bar(r.name, r.accuracy, kind(r, report), r.accuracy_ci) for r in rows]
        cards.append(("Accuracy: every attribute right", bars(items, text=percent, top=1.0)))
        points = [Point(r.name, r.seconds, r.accuracy or 0.0, kind(r, report)) for r in rows]
        cards.append(
            ("Quality against time", scatter(points, x_name="seconds per clip (logarithmic)", y_name="accuracy"))
        )
    if report.aligned:
        items = [Bar(r.name, r.clip_score or 0.0, kind(r, report), r.clip_score_ci) for r in rows]
        cards.append(("CLIPScore", bars(items, text=score)))
    items = [Bar(r.name, r.frechet, kind(r, report), r.frechet_ci) for r in rows if r.frechet is not None]
    marks = [(report.frechet_floor, "noise floor")]
    cards.append((f"{report.distance}, lower is better", bars(items, text=number, marks=marks)))
    moving = all(row.motion_absolute is not None for row in rows)
    if moving:
        items = [Bar(r.name, r.motion, kind(r, report), r.motion_ci) for r in rows]
        cards.append(
            (f"Motion relative to {report.reference}", bars(items, text=times, marks=[(1.0, report.reference)]))
        )
    if all(row.diversity is not None for row in rows):
        items = [Bar(r.name, r.diversity, kind(r, report)) for r in rows]
        cards.append(
            (f"Diversity relative to {report.reference}", bars(items, text=times, marks=[(1.0, report.reference)]))
        )
    if moving:
        items = [Bar(r.name, r.flicker, kind(r, report)) for r in rows]
        cards.append(
            (f"Flicker relative to {report.reference}", bars(items, text=times, marks=[(1.0, report.reference)]))
        )
    return _section("Charts", "", _cards("charts", cards))


def _attributes(report: Report) -> str:
    rows = [row for row in report.rows if row.attributes]
    if not rows:
        return ""
    names = list(rows[0].attributes or {})
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names, "unclear clips"))
    lines = []
    for row in rows:
        ranges = row.attributes_ci or {}
        cells = "".join(
            f'<td style="--share:{share:.3f}">{percent(share)} <small>{between(ranges.get(name))}</small></td>'
            for name, share in (row.attributes or {}).items()
        )
        unclear = f'<td style="--share:0">{percent(row.abstained)}</td>'
        lines.append(f"<tr><td>{escape(row.name)}</td>{cells}{unclear}</tr>")
    hint = "Share of clips in which the checker reads the attribute as the prompt asks, with a 95 % interval. "
    hint += "A clip that is too unclear to read counts as wrong."
    body = f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return _section("Accuracy of each attribute", hint, f'<div class="card scroll">{body}</div>')


def _health(run: Path) -> str:
    said = health.said(run)
    if said is None:
        return ""
    hint = f"{said} Prompts and seeds are fixed. Dashed lines: the teacher, and the teacher at the student's steps."
    return _section("Health", hint, _cards("curves", health.curves(run)) + health.picture(run))


def _curves(run: Path) -> str:
    found = read_curves(run / "metrics.jsonl")
    rows = {name: series for name, series in found.items() if not name.startswith("health/")}
    cards = [(name, curve(xs, ys)) for name, (xs, ys) in rows.items() if len(xs) > 1]
    hint = "Figures as logged; the strong line is a running mean. A distillation loss need not fall: judge by the figures above."
    return _section("Training", hint, _cards("curves", cards)) if cards else ""


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of every numeric key of a `metrics.jsonl` except the time. FileNotFoundError if there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a training run")
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            xs, ys = found.setdefault(name, ([], []))
            xs.append(float(row["step"]))
            ys.append(float(value))
    return {name: series for name, series in found.items() if any(map(math.isfinite, series[1]))}


def _method(report: Report) -> str:
    runs = min(row.seconds_runs for row in report.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    seeds = report.suite["seeds_per_prompt"]
    facts = {
        "prompts and seeds": f"{_prompts(report)}, {seeds} seed{'s' if seeds > 1 else ''} each, the same for every row",
        "accuracy": "share of clips with every attribute as the prompt asks; 95 % Wilson interval for the effective number of "
        "independent clips, because clips of one prompt resemble each other (design effect)",
        "minus teacher": "difference to the teacher at the same number of steps; 95 % Student's t over prompts, paired",
        report.distance: f"to {report.frechet_reference}, n = {report.seeds['clips']}, features: {report.frechet_features}; "
        "95 % jackknife over prompts at this n; it does not include the bias of few clips",
        f"{report.distance} controls": f"noise floor {number(report.frechet_floor)}, "
        f"true clips with shuffled frames {number(report.frechet_shuffled)}",
        "motion": "mean absolute difference of neighbouring frames",
        "diversity": "mean root-mean-square pixel distance between the seeds of a prompt",
        "flicker": "mean absolute second difference in time",
        "seconds": f"one clip alone, from text to latents (decoding is separate), after warm-up; at least {runs} runs",
        "memory": report.memory,
    }
    if report.aligned:
        facts["CLIPScore"] = (
            f"100 cos(frame, prompt), mean over frames, then clips, n = {report.seeds['clips']}; 95 % Student's t over prompts; "
            f"by {report.clip_score_model}"
        )
    body = f'<ul class="notes">{notes}</ul>{_list(facts)}' if notes else _list(facts)
    return _section("How it was measured", "", f'<div class="card">{body}</div>')


def _prompts(report: Report) -> str:
    texts = report.suite["texts"]
    if report.suite.get("real") and not texts:
        return f"the captions of {report.suite['prompts']} real clips"
    return f"{len(texts)} given prompts" if texts else f"{report.suite['prompts']} new prompts"


def _provenance(report: Report, recipe: str | None) -> str:
    machine = {name.replace("_", " "): str(value) for name, value in report.machine.items() if value is not None}
    settings = {
        name.replace("_", " "): str(value) for name, value in report.suite.items() if value not in (None, [], ())
    }
    cards = [
        ("Machine", _list(machine)),
        ("Versions", _list(report.versions)),
        ("Runtime", _list(report.runtime)),
        ("Weights", _list(report.models)),
        ("Suite", _list(settings)),
    ]
    body = _cards("twin", cards)
    if recipe is not None:
        body = f'<div class="card" style="margin-bottom:18px"><h3>Recipe</h3><pre>{escape(recipe.strip())}</pre></div>{body}'
    return _section("How to repeat it", "", body)


def _list(facts: Mapping[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
        + "</dl>"
    )


def _cards(grid: str, cards: Sequence[tuple[str, str]]) -> str:
    return (
        f'<div class="{grid}">'
        + "".join(f'<div class="card"><h3>{escape(h)}</h3>{b}</div>' for h, b in cards)
        + "</div>"
    )


def _section(title: str, hint: str, body: str) -> str:
    said = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _time(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"
