"""The table: Markdown for the documentation, one section per budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean

from fewstep.core.atomic import write_text
from fewstep.diffusion.times import in_steps
from fewstep.engine.probe import merit
from fewstep.evaluate.page.table import percent
from fewstep.evaluate.results import Range
from fewstep.leaderboard.budget import DEMO
from fewstep.leaderboard.claims import CLAIMS, Verdict, judge
from fewstep.leaderboard.contest import PROBES, contestants
from fewstep.leaderboard.results import COUNTS, RELATIVE, TEACHER, Figures, Result, number
from fewstep.leaderboard.runs import SUITE
from fewstep.leaderboard.switches import JOINED, TERMS
from fewstep.metrics.statistics import difference_interval

HEAD = """# Leaderboard

Every method that makes whole clips from noise, with the same teacher (the built-in one), budget, prompts, seeds and rule. These
have no row: `SelfAdversarial`, which streams; `LatentPixel` and `TimeAwareDistillation`, which begin at a clip; MSD with its
several students; and BLADE, whose student is sparse.

`fewstep leaderboard` runs what is missing and writes this page. Each run is one JSON file in `bench/leaderboard`, named
`ROW-BUDGET-SEED.json`. The recipe of a row is `ROW.yaml` in `src/fewstep/recipes/leaderboard`. A row `A{joined}B` is the recipe
of row A with the change B of `src/fewstep/leaderboard/switches.py`.

- **Budget**: forward passes of the teacher on one clip, {demo:,.0f} of them, as many as `fewstep demo` trains with. A backward
  pass counts two. Pairs that are stored before a run count too. These do not count: the decoder and the reward networks of
  feedback, heads of discriminators, and probes. A student with a head of its own or with fewer blocks counts as a whole teacher.
- **Student**: the best of {probes} of its run by one rule: mean over step counts of accuracy - 0.1 log(distance), on other
  prompts. Methods with stages inside (progressive, lightning) train students of more steps first; the rule judges those too in
  the final number of steps, for which they are not made, so the choice is in effect among fewer.
- **Figures**: {clips} clips of {prompts} prompts. Accuracy: all six attributes of the prompt are right. Distance: Frechet, to
  rendered clips of the same prompts, whose own distance is {floor:.2f}. Motion, diversity (of clips
  of one prompt) and flicker are relative to the teacher at its own steps; motion is better the nearer it is to 1. Training
  draws its scenes at random from the same world, so it meets some of these.
- **Intervals** are over prompts, not over seeds of training: where a row has one seed, another seed may change a verdict.
- With several seeds: the mean, and the lowest and highest in brackets. The best rows, by the same rule, come first; a number of
  steps that a student does not serve counts as nothing right at a distance of 160.
"""


def write_table(results: Sequence[Result], path: Path) -> Path:
    """Write the page. ValueError without the teacher's row."""
    teachers = [result for result in results if result.name == TEACHER]
    if not teachers:
        raise ValueError("the teacher was not measured; run fewstep leaderboard teacher")
    runs = sorted((r for r in results if r.name != TEACHER), key=lambda r: (r.budget, r.name, r.seed))
    parts = [heading(teachers[0].floor), teacher_section(teachers[0])]
    for budget, group in groupby(runs, key=lambda r: r.budget):
        parts.append(budget_section(budget, list(group), teachers[0].most))
    known = contestants()
    if lacking := sorted(set(known) - {run.name for run in runs}):
        parts.append(f"Not run yet: {', '.join(lacking)}.\n")
    if changed := sorted({run.name for run in runs if run.name not in known or run.code != known[run.name].code}):
        parts.append(f"Of a recipe or code that has changed since: {', '.join(changed)}.\n")
    write_text(path, "\n".join(parts))
    return path


def heading(floor: float) -> str:
    clips = SUITE.prompts * SUITE.seeds_per_prompt
    return HEAD.format(demo=DEMO, probes=PROBES, prompts=SUITE.prompts, clips=clips, floor=floor, joined=JOINED)


def teacher_section(teacher: Result) -> str:
    reference = teacher.most
    lines = [
        f"| {n} | {percent(row.accuracy)} | {row.frechet:.2f} | {' | '.join(relative([row], reference))} |"
        for n, row in sorted(teacher.rows.items(), reverse=True)
    ]
    names = ["steps of the teacher", "accuracy", "distance", *RELATIVE]
    return "\n".join(["## The teacher", "", f"| {' | '.join(names)} |", f"|{' ---: |' * len(names)}", *lines, ""])


def budget_section(budget: float, results: Sequence[Result], reference: Figures) -> str:
    """The rows of one budget, the best first, and what they say of the papers' claims."""
    names = sorted({result.name for result in results}, key=lambda name: -rule(results, name))
    switched = {name.partition(JOINED)[0] for name in names if JOINED in name}

    def table(chosen: Iterable[str]) -> list[str]:
        lines = [row(name, [r for r in results if r.name == name], reference) for name in chosen]
        return [*HEADINGS, *lines, ""] if lines else []

    lines = [
        f"## {title_of(budget)}",
        "",
        *ahead(results, reference),
        "",
        "Accuracy / distance at each number of steps; motion, diversity and flicker at the fewest steps of the row.",
        "",
        *table(name for name in names if JOINED not in name),
        *said(results, reference),
    ]
    for base in sorted(switched):
        own = sorted(name for name in names if name.startswith(f"{base}{JOINED}"))
        lines += [
            f"### {base}, one change at a time",
            "",
            *table([*(n for n in names if n == base), *own]),
            *gains(base, {**{name: name.partition(JOINED)[2] for name in own}, **TERMS.get(base, {})}, results),
        ]
    return "\n".join(lines)


def ahead(results: Sequence[Result], reference: Figures) -> list[str]:
    """The row that has most clips right at each number of steps, those with a change too, beside the teacher at its own steps."""
    lines = ["Most clips right, of all rows and those with one change, beside the teacher at its own steps:", ""]
    for n in COUNTS:
        served: dict[str, list[Figures]] = {}
        for run in results:
            if n in run.rows:
                served.setdefault(run.name, []).append(run.rows[n])
        if served:
            name, best = max(served.items(), key=lambda item: mean(row.accuracy for row in item[1]))
            share, far, varied = (
                mean(getattr(row, figure) for row in best) / getattr(reference, figure)
                for figure in ("accuracy", "frechet", "diversity")
            )
            lines.append(
                f"- {in_steps(n)}: **{name}**, {percent(share)} of the teacher's accuracy, {far:.1f} times its distance and "
                f"{percent(varied)} of its diversity, {_seeds(len(best))}"
            )
    return lines


def gains(base: str, changed: Mapping[str, str], results: Sequence[Result]) -> list[str]:
    """What each change adds to the figures of the base, where both were run; `changed` names the change of each row."""
    if not (runs := {run.seed: run for run in results if run.name == base}):
        return []
    lines = [
        f"What each change adds to {base}, accuracy / distance, with the intervals of independent clips; bold: without 0:",
        "",
        f"| | {' | '.join(in_steps(n) for n in COUNTS)} |",
        f"| --- |{' ---: |' * len(COUNTS)}",
    ]
    for name, change in changed.items():
        own = {run.seed: run for run in results if run.name == name and run.seed in runs}
        if own:
            both = [(own[seed].rows, runs[seed].rows) for seed in sorted(own)]
            cells = [_gain([(one[n], two[n]) for one, two in both if n in one and n in two]) for n in COUNTS]
            lines.append(f"| {change} | {' | '.join(cells)} |")
    return [*lines, ""]


def _gain(pairs: Sequence[tuple[Figures, Figures]]) -> str:
    """Of rows of the same seeds, changed and base; figures without an interval are left out."""
    cells = []
    for figure in ("accuracy", "frechet") if pairs else ():
        if any(getattr(row, f"{figure}_ci") is None for rows in pairs for row in rows):
            continue
        (new, its), (old, other) = (_middle(rows, figure) for rows in zip(*pairs, strict=True))
        low, high = difference_interval(new, its, old, other)
        cell = f"{new - old:+.2f} [{low:.2f}, {high:.2f}]"
        cells.append(cell if low <= 0 <= high else f"**{cell}**")
    return " / ".join(cells)


def _middle(rows: Sequence[Figures], figure: str) -> tuple[float, Range]:
    """Means over seeds of a figure and of its interval."""
    low, high = (mean(getattr(row, f"{figure}_ci")[end] for row in rows) for end in (0, 1))
    return mean(getattr(row, figure) for row in rows), (low, high)


HEADINGS = (
    f"| | {' | '.join([*map(in_steps, COUNTS), *RELATIVE])} | iterations | minutes | memory | seeds |",
    f"| --- |{' ---: |' * (len(COUNTS) + len(RELATIVE) + 4)}",
)
"""Of a table of rows."""


def title_of(budget: float) -> str:
    return "The demo's budget" if budget == 1 else f"{number(budget)} times the demo's budget"


def row(name: str, runs: Sequence[Result], reference: Figures) -> str:
    cells = [cell([run.rows[n] for run in runs if n in run.rows]) for n in COUNTS]
    cells += relative([run.rows[min(run.rows)] for run in runs], reference)
    cells += [f"{runs[0].iterations}", f"{mean(run.seconds for run in runs) / 60:.0f}"]
    cells += [f"{max(run.memory_mb for run in runs) / 1024:.1f} GiB", str(len(runs))]
    return f"| {name} | {' | '.join(cells)} |"


def relative(rows: Sequence[Figures], reference: Figures) -> list[str]:
    """The figures in shares of the teacher's, over several seeds."""
    return [spread([getattr(row, name) / getattr(reference, name) for row in rows]) for name in RELATIVE]


def cell(rows: Sequence[Figures]) -> str:
    if not rows:
        return ""
    return f"{spread([one.accuracy for one in rows])} / {spread([one.frechet for one in rows])}"


def spread(values: Sequence[float]) -> str:
    """The mean, with the lowest and highest of several."""
    ends = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{mean(values):.2f}{ends}"


def rule(results: Iterable[Result], name: str) -> float:
    """By which rows are sorted: the probe's rule, mean over steps and seeds; a missing step count has 0 / 160."""
    found = [run.rows.get(n) for run in results if run.name == name for n in COUNTS]
    return mean(merit(0.0, 160.0) if one is None else merit(one.accuracy, one.frechet) for one in found)


NAMES = {"frechet": "distance"}
"""What the page calls a figure, if not by its own name."""


def said(results: Sequence[Result], reference: Figures) -> list[str]:
    """The verdicts on the claims that can be judged."""
    verdicts = [found for claim in CLAIMS if (found := judge(claim, results, reference)).outcome != "not measured"]
    if not verdicts:
        return []
    return ["What papers claim, at this budget:", "", *map(_line, verdicts), ""]


def _line(verdict: Verdict) -> str:
    claim, (mine, theirs) = verdict.claim, (_seeds(count) for count in verdict.seeds)
    figure = NAMES.get(claim.figure, claim.figure)
    return (
        f"- {claim.text} ({claim.cite}) **{verdict.outcome}**: {figure} at {in_steps(claim.steps)}, "
        f"{claim.better} {verdict.better:.2f} ({mine}), {claim.worse} {verdict.worse:.2f} ({theirs})."
    )


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"
