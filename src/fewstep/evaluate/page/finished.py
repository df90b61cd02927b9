"""The page of a comparison of finished videos: verdict, table, synchronised players with the worst cases first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fewstep.core.atomic import write_text
from fewstep.evaluate.finished.figures import mean
from fewstep.evaluate.finished.findings import Finding, apart
from fewstep.evaluate.finished.judge import Comparison, Shown, Video
from fewstep.evaluate.finished.measures import BY_NAME, MEASURES, Measure
from fewstep.evaluate.page.table import number
from fewstep.evaluate.page.template import page

FILE = "compare.html"
TOLD = 4
"""Differences of one video that are told under its player; the others are in a table."""


def write_page(found: Comparison, folder: Path | str) -> Path:
    """Write `compare.html` to the output folder of `compare_videos`. The page plays the copies in `videos/` beside it."""
    body = [_cases(found), _table(found), _controls(found), _distances(found), _method(found)]
    text = page(
        "finished.html",
        title=escape(f"{', '.join(found.sides[1:])} compared with {found.sides[0]}"),
        verdict="".join(f"<li>{escape(line)}</li>" for line in found.verdict),
        body="\n".join(filter(None, body)),
    )
    path = Path(folder) / FILE
    write_text(path, text)
    return path


def worst_first(found: Comparison) -> list[tuple[float, Video]]:
    """The videos with the number of margins by which any side differs most, the worst first."""
    rated = [(max((abs(_apart(video, i)[0][1]) for i in range(1, len(found.sides)) if _apart(video, i)), default=0.0), video)
             for video in found.videos]  # fmt: skip
    return sorted(rated, key=lambda pair: -pair[0])


def _apart(video: Video, side: int) -> list[tuple[Measure, float]]:
    return apart(video.sides[side].figures, video.sides[side].reference)


def _cases(found: Comparison) -> str:
    places = {video.name: i for i, video in enumerate(found.videos)}
    boxes = [_case(found, video, worst, places[video.name]) for worst, video in worst_first(found)]
    used = [m for m in MEASURES if any(one.figures[m.name] is not None for v in found.videos for one in v.sides)]
    options = "".join(f'<option value="{m.name}">{escape(m.title)}</option>' for m in used)
    bar = (
        '<div class="bar"><label>Worst first by <select id="sort"><option value="">any measure</option>'
        f'{options}<option value="name">name</option></select></label>'
        '<label><input type="checkbox" id="auto" checked> play what is on the screen</label>'
        '<label>Speed <select id="speed"><option value="1">1</option><option value="0.5">0.5</option>'
        '<option value="0.25">0.25</option></select></label></div>'
    )
    hint = "All players of a line show the same moment. Copies are scaled down to at most 512 pixels; figures are of the files."
    return _section("Videos, worst first", hint, f'{bar}<div id="cases">{"".join(boxes)}</div>')


def _case(found: Comparison, video: Video, worst: float, place: int) -> str:
    players = "".join(_player(found, video, side) for side in range(len(found.sides)))
    largest: dict[str, float] = {}
    for side in range(1, len(found.sides)):
        for measure, margins in _apart(video, side):
            largest[measure.name] = max(largest.get(measure.name, 0.0), round(abs(margins), 3))
    longest = max(range(len(video.sides)), key=lambda side: video.sides[side].seconds)
    still = video.sides[0].player.endswith(".png")
    fps = "1" if still else video.sides[0].format.split(", ")[1].split(" ")[0]
    controls = "" if still else (
        '<div class="controls"><button class="play">Play</button><button class="step" data-step="-1">&#8249; frame</button>'
        '<button class="step" data-step="1">frame &#8250;</button>'
        '<input type="range" min="0" max="1" step="0.001" value="0"></div>'
    )  # fmt: skip
    prompt = f"<p>“{escape(video.prompt)}”</p>" if video.prompt else ""
    return (
        f'<article class="card case" data-place="{place}" data-worst="{worst:.3f}" data-fps="{fps}" data-lead="{longest}" '
        f"data-apart='{escape(json.dumps(largest), quote=True)}'>"
        f"<header><h3>{escape(video.name)}</h3>{prompt}</header>"
        f'<div class="players">{players}</div>{controls}'
        f"<details><summary>All figures</summary>{_figures(found, video)}</details></article>"
    )


def _player(found: Comparison, video: Video, side: int) -> str:
    name, source = escape(found.sides[side]), escape(video.sides[side].player)
    alt = f"{name}: {escape(video.name)}"
    picture = f'<img src="{source}" alt="{alt}" loading="lazy">' if source.endswith(".png") else (
        f'<video src="{source}" aria-label="{alt}" muted playsinline preload="metadata"></video>'
    )  # fmt: skip
    one = video.sides[side]
    told = "<li>reference</li>" if side == 0 else "".join(
        f"<li>{escape(m.title)} {m.written(one.figures[m.name])}, reference {m.written(one.reference[m.name])}</li>"
        for m, _ in _apart(video, side)[:TOLD]
    ) or "<li>within all margins</li>"  # fmt: skip
    changed = (
        f"<li>compared in {escape(one.compared_in)} ({escape('; '.join(one.changes))})</li>" if one.changes else ""
    )
    facts = f"<ul>{told}<li>{escape(one.format)}</li>{changed}</ul>"
    return f"<figure>{picture}<figcaption><b>{name}</b>{facts}</figcaption></figure>"


def _figures(found: Comparison, video: Video) -> str:
    used = [m for m in MEASURES if any(one.figures[m.name] is not None for one in video.sides)]
    rows = [[(escape(m.title), ""), *((_both(m, one), "") for one in video.sides)] for m in used]
    return _grid(["", *map(escape, found.sides)], rows)


def _both(measure: Measure, one: Shown) -> str:
    """A figure, and the reference's in the same format if the files were resampled."""
    own = measure.written(one.figures[measure.name])
    return f"{own} <small>reference {measure.written(one.reference[measure.name])}</small>" if one.changes else own


def _table(found: Comparison) -> str:
    heads = [
        "",
        f"{escape(found.sides[0])}<br>mean",
        *(f"{escape(side)}<br>mean, compared" for side in found.sides[1:]),
    ]
    rows = []
    for measure in MEASURES:
        mine = [next((f for f in found.of(side) if f.measure == measure.name), None) for side in found.sides[1:]]
        if any(finding is not None for finding in mine):
            title = (f'<span title="{escape(measure.about)}">{escape(measure.title)}</span>', "")
            first = (measure.written(mean([video.sides[0].figures for video in found.videos], measure.name)), "")
            rows.append([title, first, *(_cell(measure, finding) for finding in mine)])
    hint = (
        f"{len(found.videos)} videos of each. In brackets: 95 % intervals over videos (Student's t, paired). Coloured: the whole "
        "interval is beyond the margin (10 % for ratios), or within it (green)."
    )
    return _section("Figures", hint, f'<div class="card scroll">{_grid(heads, rows)}</div>')


def _cell(measure: Measure, finding: Finding | None) -> tuple[str, str]:
    if finding is None:
        return "-", ""
    compared = "" if finding.compared is None else measure.compared(finding.compared)
    ends = "" if finding.interval is None else f"[{measure.between(finding.interval)}]"
    return f"{measure.written(finding.mean)} &nbsp; {compared} <small>{ends}</small>", finding.verdict


def _controls(found: Comparison) -> str:
    names = [name for name in found.controls["a still picture"] if any(f.measure == name for f in found.findings)]
    if not names:
        return ""
    rows = []
    for name in names:
        measure = BY_NAME[name]
        values = [next((f.mean for f in found.of(side) if f.measure == name), None) for side in found.sides[1:]]
        reference = mean([video.sides[0].figures for video in found.videos], name)
        control = [found.controls[kind][name] for kind in ("a still picture", "frames shuffled")]
        rows.append([(measure.title, ""), *((measure.written(v), "") for v in (reference, *values, *control))])
    heads = ["", *map(escape, found.sides), "control:<br>a still picture", "control:<br>frames shuffled"]
    hint = (
        "Smoothness, flickering and consistency reward stillness: a still picture has the best score. Read them only together "
        "with dynamic_degree, the share of videos that move. Not comparable with VBench's own table."
    )
    return _section("VBench-like measures with controls", hint, f'<div class="card scroll">{_grid(heads, rows)}</div>')


def _distances(found: Comparison) -> str:
    if not found.distances:
        return ""
    rows = []
    for one in found.distances:
        ends = "" if one.interval is None else f" <small>[{number(one.interval[0])}, {number(one.interval[1])}]</small>"
        rows.append([(escape(one.side), ""), (number(one.value) + ends, ""), (number(one.floor), ""), (str(one.n), "")])
    heads = ["", "Frechet distance to the reference", "halves of the reference", "videos"]
    hint = f"Features: {escape(found.features or '')}. Brackets: jackknife over videos at this n, without the bias."
    return _section("Distance", hint, f'<div class="card scroll">{_grid(heads, rows)}</div>')


def _method(found: Comparison) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    facts = {**dict(zip(found.sides, found.paths)), **found.versions}
    facts |= {"features": found.features or "none", "CLIP": found.clip or "none"}
    facts |= {m.title: f"{m.about}; margin {_margin(m)}" for m in MEASURES}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return _section(
        "How it was measured", "", f'<div class="card"><ul class="notes">{notes}</ul><br><dl>{listed}</dl></div>'
    )


def _margin(measure: Measure) -> str:
    if measure.kind == "ratio":
        return f"{100 * measure.margin:.0f} %"
    return f"{100 * measure.margin:g} points" if measure.unit in ("share", "change") else f"{measure.margin:g}"


def _grid(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    lines = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>" for cell, kind in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _section(title: str, hint: str, body: str) -> str:
    said = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"
