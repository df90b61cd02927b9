"""The page: one line per row, its clips at 4, 2 and 1 steps side by side with the teacher's."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.atomic import write_text
from fewstep.diffusion.times import in_steps
from fewstep.evaluate import load_report
from fewstep.evaluate.page.animate import gif_bytes
from fewstep.evaluate.page.table import percent
from fewstep.evaluate.page.template import page
from fewstep.evaluate.results import CLIPS, FILE
from fewstep.leaderboard.results import COUNTS, TEACHER, Result
from fewstep.leaderboard.runs import figures_of
from fewstep.leaderboard.table import rule, title_of

SHOWN = 3
"""Prompts on the page."""


def write_page(results: Sequence[Result], runs: Path, path: Path) -> Path:
    """Write the page to `path`, from the clips that lie in `runs`; a row without clips there has figures only."""
    budgets = sorted({result.budget for result in results if result.name != TEACHER})
    clips = {result.file: _clips(runs / figures_of(result)) for result in results}
    teacher = next(result for result in results if result.name == TEACHER)
    body = "\n".join(_section(budget, results, teacher, clips) for budget in budgets)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page("leaderboard.html", body=body, prompts=_prompts(runs / figures_of(teacher))))
    return path


def _prompts(folder: Path) -> str:
    """The prompts of the clips, which the teacher's evaluation in `folder` has."""
    if not (folder / FILE).is_file():
        return "<p>The teacher's clips are not on this machine, only its figures.</p>"
    prompts = [shown["prompt"] for shown in load_report(folder).previews[:SHOWN]]
    return f"<ol>{''.join(f'<li>“{escape(prompt)}”</li>' for prompt in prompts)}</ol>"


def _section(
    budget: float, results: Sequence[Result], teacher: Result, clips: Mapping[str, Mapping[str, Tensor]]
) -> str:
    mine = [result for result in results if result.budget == budget]
    names = sorted({result.name for result in mine}, key=lambda name: -rule(mine, name))
    firsts = [min((r for r in mine if r.name == name), key=lambda r: r.seed) for name in names]
    full = max(teacher.rows)
    head = "".join(f"<th>{in_steps(n)}</th>" for n in COUNTS)
    reference = "".join(_cell(clips[teacher.file], teacher, n) for n in COUNTS)
    lines = [
        f"<tr><th>teacher at {full} steps</th>{_cell(clips[teacher.file], teacher, full)}</tr>",
        f"<tr><th>teacher</th>{reference}</tr>",
        *(
            f"<tr><th>{escape(result.name)}<small>{escape(result.method)}</small></th>"
            + "".join(_cell(clips[result.file], result, n) for n in COUNTS)
            + "</tr>"
            for result in firsts
        ),
    ]
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section><h2>{title_of(budget)}</h2><div class="card scroll">{table}</div></section>'


def _cell(clips: Mapping[str, Tensor], result: Result, steps: int) -> str:
    if steps not in result.rows:
        return '<td class="soft">not served</td>'
    row = result.rows[steps]
    shown = clips.get(str(steps))
    pictures = (
        "" if shown is None else "".join(_picture(clip, f"{result.name}, {steps} steps") for clip in shown[:SHOWN])
    )
    return f'<td><div class="clips">{pictures}</div>{percent(row.accuracy)} <span class="soft">/ {row.frechet:.2f}</span></td>'


def _picture(clip: Tensor, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/gif;base64,{base64.b64encode(gif_bytes(clip)).decode()}">'


def _clips(folder: Path) -> Mapping[str, Tensor]:
    return load_file(folder / CLIPS) if (folder / CLIPS).is_file() else {}
