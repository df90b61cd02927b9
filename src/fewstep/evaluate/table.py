"""The figures of a report in a terminal."""

from __future__ import annotations

from rich.table import Table

from fewstep.evaluate.results import Report, Row


def table(report: Report) -> Table:
    """A rich table, one line per row; dim rows are teachers, the last line is the renderer."""
    grid = Table(caption="\n".join(captions(report)), caption_justify="left", pad_edge=False)
    grid.add_column("", no_wrap=True)
    for head in ("NFE", "all right", "vs teacher", "Frechet", "motion", "diversity", "flicker", "s/clip", "GFLOP"):
        grid.add_column(head, justify="right")
    for row in report.rows:
        grid.add_row(*cells(row), style="bold" if row.role == "student" else "")
    if report.truth is not None:
        t = report.truth
        grid.add_row(
            "renderer", "", percent(t.accuracy), "", number(t.frechet), times(t.motion), times(t.diversity), times(t.flicker),
            "", "", style="dim",
        )  # fmt: skip
    return grid


def details(report: Report) -> Table:
    """What the first table has no room for: every attribute with its interval, and what a clip costs."""
    names = list(report.rows[0].attributes or {})
    grid = Table(pad_edge=False)
    grid.add_column("", no_wrap=True)
    for head in (*names, *(["unclear"] if names else []), "p95 s/clip", "decode s", "MB"):
        grid.add_column(head, justify="right")
    for row in report.rows:
        shares, ranges = row.attributes or {}, row.attributes_ci or {}
        right = [percent(shares.get(name)) + between(ranges.get(name)) for name in names]
        unclear = [percent(row.abstained)] if names else []
        costs = (number(row.seconds_p95), number(row.seconds_decode), f"{row.memory_mb:,.0f}")
        grid.add_row(row.name, *right, *unclear, *costs, style="bold" if row.role == "student" else "")
    return grid


def cells(row: Row) -> tuple[str, ...]:
    """One row as text."""
    gain = "" if row.gain is None or row.gain.accuracy is None else f"{100 * row.gain.accuracy:+.0f} pt"
    return (
        row.name,
        str(row.nfe),
        percent(row.accuracy) + between(row.accuracy_ci),
        gain,
        "reference" if row.frechet is None else number(row.frechet),
        times(row.motion),
        times(row.diversity),
        times(row.flicker),
        number(row.seconds),
        "-" if row.flops is None else number(row.flops / 1e9),
    )


def captions(report: Report) -> list[str]:
    """What the columns mean, and what to beware of."""
    clips = report.seeds["clips"]
    return [
        f"{clips} clips per row. all right: every attribute of the prompt, with 95 % interval (clips of one prompt count for "
        "fewer); vs teacher: at the same steps.",
        f"Frechet: n = {clips}, to {report.frechet_reference}, features {report.frechet_features}; "
        f"floor {number(report.frechet_floor)}, frames shuffled {number(report.frechet_shuffled)}.",
        f"motion, diversity, flicker: relative to {report.reference}. s/clip: one clip alone, text to latents, median.",
        *report.notes,
    ]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
