"""The page and the command of a drift evaluation: what they say is in the results, and it is well-formed."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.cli.drifting import names
from fewstep.diffusion import Stream
from fewstep.evaluate.page.drift import FILE, said, worst_first, write_drift_page
from fewstep.evaluate.page.svg import Line, lines
from fewstep.evaluate.streams import Claim, DriftReport, DriftSuite, load_drift, measure_drift, rows_of
from support_engine import tiny_model
from test_streaming import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
SUITE = DriftSuite(times=(1, 2, 3), prompts=4, seeds_per_prompt=1, batch=4, shown=2, features="pooled")
VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Opened tags that wait for their end, and attributes that were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["alt"] or "")
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drift")
    measure_drift(rows_of({"a <student>": streaming_model(Stream(chunks=(2,), window=4))}, tiny_model()), SUITE, path)
    return path


def test_the_page_is_whole_and_shows_every_row(folder: Path) -> None:
    text = write_drift_page(folder).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "a &lt;student&gt;" in text and "<student>" not in text
    for section in (
        "Targets",
        "Film strips",
        "Figures",
        "Drift per 100 frames",
        "Attributes",
        "By window",
        "Switched prompts",
    ):
        assert f"<h2>{section}" in text
    assert len(tags.images) == SUITE.shown * (3 + 1 + 1 + 3), "two streams of 3 windows, two teachers of one"
    assert "http" not in text.replace("http-equiv", "")


def test_the_worst_prompts_come_first(folder: Path) -> None:
    report = load_drift(folder)
    right = ((1, 1, 1), (0, 0, 0), (1, 0, 1), (1, 0, 0))
    marked = replace(report, rows=(replace(report.rows[0], right=right), *report.rows[1:]))
    assert worst_first(marked) == [1, 3, 2, 0]
    marked.save(folder)
    text = write_drift_page(folder).read_text(encoding="utf-8")
    places = [text.find(f"“{prompt}”") for prompt in report.prompts]
    assert -1 < places[1] < places[3] and places[0] == places[2] == -1
    report.save(folder)


def test_a_claim_says_its_figure_its_interval_and_what_is_wanted() -> None:
    claim = Claim(row="a", text="motion", value=0.91, interval=(0.85, 0.97), low=0.8, high=1.2)
    assert said(claim) == "a: motion: 0.91 [0.85, 0.97], wanted 0.8 to 1.2"
    assert (
        said(replace(claim, value=None, interval=None, high=None))
        == "a: motion: undefined, because it is relative to 0, wanted at least 0.8"
    )


def test_a_chart_begins_at_0_and_draws_a_single_point_as_a_level() -> None:
    drawn = lines(
        [Line("a", (0, 2, 4), (1.0, 2.0, 4.0), "l0", ((0.5, 2), None, (3, 5))), Line("b", (0,), (2.5,), "l1", ((2, 3),))],
        x_name="seconds", text=str,
    )  # fmt: skip
    points = re.findall(r'<polyline class="line ([^"]+)" points="([^"]+)"', drawn)
    assert [kind for kind, _ in points] == ["l0", "l1 level"]
    first, level = ([tuple(map(float, p.split(","))) for p in text.split(" ")] for _, text in points)
    assert first == [(52.0, 120.0), (192.0, 92.0), (332.0, 36.0)]  # the axis goes from 0 to 5, the top of the band
    assert level == [(52.0, 78.0), (332.0, 78.0)]
    assert drawn.count("<polygon") == 1


def test_names_of_rows_are_short_and_different() -> None:
    assert names(["runs/a/student", "b"]) == ["a", "b"]
    assert names(["x/a/student", "y/a/student"]) == ["x/a/student", "y/a/student"]


def test_the_command_measures_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streaming_model(Stream(chunks=(2,), window=4)).save(tmp_path / "run/student")
    tiny_model().save(tmp_path / "teacher")
    words = [
        "drift",
        tmp_path / "run/student",
        "--teacher",
        tmp_path / "teacher",
        "--output",
        tmp_path / "out",
        "--times",
        1,
        2,
    ]
    words += ["--causal", tmp_path / "run/student", "--prompts", 4, "--no-switch", "--quiet", "--features", "pooled"]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert (
        "run " in out
        and "causal 2" in out
        and "teacher 3" in out
        and out.splitlines()[-1] == str(tmp_path / "out" / FILE)
    )
    report = load_drift(tmp_path / "out")
    assert isinstance(report, DriftReport) and report.switches == () and report.row("run").role == "student"
    assert main(["drift", str(tmp_path / "run/student"), "--output", str(tmp_path / "out"), "--times", "2", "4"]) == 2
    assert "times must rise from 1" in capsys.readouterr().err
    student, causal = (report.row(name).curves["motion"].values for name in ("run", "causal 2"))
    assert student == causal, "the same weights, prompts and noise"
