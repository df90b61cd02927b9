"""The figures of a report in a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from fewstep.evaluate.results import Report, Row, Truth


def table(report: Report) -> Table:
    """A rich table, one line per row. Students are bold; the dim last line has the true clips."""
    grid = Table(caption="\n".join(captions(report)), caption_justify="left", pad_edge=False)
    grid.add_column("", no_wrap=True)
    for head in heads(report):
        grid.add_column(head, justify="right")
    for row in report.rows:
        grid.add_row(*cells(row, report), style="bold" if row.role == "student" else "")
    if report.truth is not None:
        grid.add_row(*truth_cells(report.truth, report), style="dim")
    return grid


def details(report: Report) -> Table:
    """A second table: every attribute with its interval, and the cost of a clip."""
    names = list(report.rows[0].attributes or {})
    grid = Table(pad_edge=False)
    grid.add_column("", no_wrap=True)
    extrapolated = any(row.frechet_infinity is not None for row in report.rows)
    beyond = [f"{report.distance}, n to infinity"] if extrapolated else []
    for head in (*names, *(["unclear"] if names else []), *beyond, "p95 s/clip", "decode s", "MB"):
        grid.add_column(head, justify="right")
    for row in report.rows:
        shares, ranges = row.attributes or {}, row.attributes_ci or {}
        right = [percent(shares.get(name)) + between(ranges.get(name)) for name in names]
        unclear = [percent(row.abstained)] if names else []
        far = ["" if row.frechet_infinity is None else number(row.frechet_infinity)] if extrapolated else []
        costs = (number(row.seconds_p95), number(row.seconds_decode), f"{row.memory_mb:,.0f}")
        grid.add_row(row.name, *right, *unclear, *far, *costs, style="bold" if row.role == "student" else "")
    return grid


def heads(report: Report) -> list[str]:
    """The columns after the name; a score that was not measured has no column."""
    scores = ["accuracy", "vs teacher"] if report.checked or not report.aligned else []
    scores += ["CLIPScore", "vs teacher"] if report.aligned else []
    return ["NFE", *scores, report.distance, "motion", "diversity", "flicker", "s/clip", "GFLOP"]


def cells(row: Row, report: Report) -> list[str]:
    """One row as text."""
    gain, scores = row.gain, []
    if report.checked or not report.aligned:
        gained = "" if gain is None or gain.accuracy is None else f"{100 * gain.accuracy:+.0f} pt"
        scores += [percent(row.accuracy) + between(row.accuracy_ci), gained]
    if report.aligned:
        gained = "" if gain is None or gain.clip_score is None else f"{gain.clip_score:+.1f}"
        scores += [score(row.clip_score) + ends(row.clip_score_ci, score), gained]
    return [
        row.name,
        str(row.nfe),
        *scores,
        "reference" if row.frechet is None else number(row.frechet) + ends(row.frechet_ci, number),
        times(row.motion),
        times(row.diversity),
        times(row.flicker),
        number(row.seconds),
        "-" if row.flops is None else number(row.flops / 1e9),
    ]


def truth_cells(truth: Truth, report: Report) -> list[str]:
    """The row of true clips, in the columns of `heads`."""
    scores = [percent(truth.accuracy), ""] if report.checked or not report.aligned else []
    scores += [score(truth.clip_score), ""] if report.aligned else []
    looks = [times(truth.motion), times(truth.diversity), times(truth.flicker)]
    return [truth.name, "", *scores, "-" if truth.frechet is None else number(truth.frechet), *looks, "", ""]


def captions(report: Report) -> list[str]:
    """The meaning of the columns, and the notes of the report."""
    clips, said = report.seeds["clips"], []
    if report.checked or not report.aligned:
        said.append(
            f"{clips} clips per row. accuracy: clips with every attribute of the prompt right, with 95 % interval (clips of one "
            "prompt count less); vs teacher: minus the teacher's accuracy at the same steps."
        )
    if report.aligned:
        said.append(
            f"CLIPScore: n = {clips}, 100 cos(frame, prompt), mean over frames, then clips, with 95 % interval; by "
            f"{report.clip_score_model}; vs teacher: minus the teacher's CLIPScore at the same steps."
        )
    return [
        *said,
        f"{report.distance}: n = {clips}, to {report.frechet_reference}, features {report.frechet_features}; "
        f"noise floor {number(report.frechet_floor)}, with shuffled frames {number(report.frechet_shuffled)}.",
        f"motion, diversity, flicker: relative to {report.reference}. s/clip: median for one clip alone, text to latents.",
        *report.notes,
    ]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def ends(interval: tuple[float, float] | None, text: Callable[[float], str]) -> str:
    return "" if interval is None else f" [{text(interval[0])}, {text(interval[1])}]"


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
