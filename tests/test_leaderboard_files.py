"""What the leaderboard reads and writes: files of figures, damaged ones too, the table's text and the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep import leaderboard
from fewstep.evaluate.results import CLIPS, FILE
from fewstep.leaderboard import TEACHER, Figures, Result
from fewstep.leaderboard.results import DIVISORS, load_result, load_results
from fewstep.leaderboard.runs import figures_of
from fewstep.leaderboard.table import heading
from fewstep.models.bundle import VideoModel
from support_leaderboard import figures, result

ROWS = {4: figures(0.8), 2: figures(0.7), 1: figures(0.5)}


@pytest.fixture
def teacher() -> Result:
    return result(TEACHER, {50: figures(0.9), **ROWS}, budget=0.0)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = result("a", {1: replace(figures(0.5), frechet_ci=None), **ROWS}, budget=0.25, seed=3)
    assert load_result(made.save(tmp_path)) == made


def test_drafts_of_a_killed_process_are_no_results(tmp_path: Path) -> None:
    made = result("a", ROWS)
    made.save(tmp_path)
    shutil.copy(tmp_path / made.file, tmp_path / ".a-1-0.draft.json")
    (tmp_path / ".b-1-0.draft.json").write_text('{"name": ')
    assert load_results(tmp_path) == [made]
    assert load_results(tmp_path / "nowhere") == []


def test_a_copy_does_not_count_as_another_run(tmp_path: Path) -> None:
    made = result("a", ROWS)
    shutil.copy(made.save(tmp_path), tmp_path / "a-1-1.json")
    with pytest.raises(ValueError, match=r"a-1-1\.json has the figures of a-1-0\.json.*[Dd]elete it"):
        load_results(tmp_path)


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tree: [], "keys and values"),
        (lambda tree: {}, "name"),
        (_without("rows"), "rows"),
        (_without("floor"), "floor"),
        (lambda tree: tree | {"flour": 1}, "flour"),
        (lambda tree: tree | {"rows": []}, "rows"),
        (lambda tree: tree | {"rows": {}}, "no figures"),
        (lambda tree: tree | {"rows": {"four": tree["rows"]["4"]}}, "four"),
        (lambda tree: tree | {"rows": {"4": _without("motion")(tree["rows"]["4"])}}, "motion"),
        (lambda tree: tree | {"rows": {"4": tree["rows"]["4"] | {"accuracy": None}}}, "accuracy"),
        (lambda tree: tree | {"rows": {"4": tree["rows"]["4"] | {"accuracy": 7.0}}}, "accuracy must be at most 1"),
        (lambda tree: tree | {"rows": {"4": tree["rows"]["4"] | {"frechet": -1.0}}}, "frechet must be at least 0"),
        (lambda tree: tree | {"rows": {"0": tree["rows"]["4"]}}, "must be at least 1, got 0"),
        (lambda tree: tree | {"budget": "much"}, "budget"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error_that_says_what_to_do(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    path = result("a", ROWS).save(tmp_path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=reason) as error:
        load_results(tmp_path)
    assert str(path) in str(error.value) and "Delete it and run the row again" in str(error.value)


@pytest.mark.parametrize(
    "rows",
    [ROWS, *({50: replace(figures(0.9), **{name: 0.0})} for name in DIVISORS)],  # type: ignore[arg-type]
)
def test_a_teacher_by_whose_figures_nothing_can_be_divided_is_refused(tmp_path: Path, rows: dict[int, Figures]) -> None:
    result(TEACHER, rows, budget=0.0).save(tmp_path)
    with pytest.raises(ValueError, match="lacks the teacher's .* at its own steps.*fewstep leaderboard teacher"):
        load_results(tmp_path)


def test_a_row_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    path = result("a", ROWS).save(tmp_path)
    path.write_text(path.read_text().replace('"2": {', '"4": {'))
    with pytest.raises(ValueError, match="a key occurs twice in 4, 4, 1"):
        load_results(tmp_path)


@pytest.mark.parametrize("content", [b'{"name": "a", ', b"", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_the_same_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a-1-0.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a-1-0\.json cannot be read: .* Delete it and run the row again: fewstep leaderboard a"
    ):
        load_results(tmp_path)


def test_the_teacher_is_measured_again_when_its_weights_change(tmp_path: Path, teacher: Result) -> None:
    assert not leaderboard.teacher_measured(tmp_path)
    teacher.save(tmp_path)
    assert not leaderboard.teacher_measured(tmp_path), "of other weights"
    replace(teacher, code=VideoModel.from_pretrained("world").fingerprint("denoiser")).save(tmp_path)
    assert leaderboard.teacher_measured(tmp_path)


def test_the_page_needs_no_clips(tmp_path: Path, teacher: Result) -> None:
    made = result("dmd2", {4: figures(0.8125), 1: figures(0.5)})
    path = leaderboard.write_page([made, teacher], tmp_path / "runs", tmp_path / "pages" / "page.html")
    text = path.read_text(encoding="utf-8")
    assert "81 %" in text and "not served" in text and "teacher at 50 steps" in text
    assert "<img" not in text and "clips are not on this machine" in text


def test_the_page_shows_clips_and_prompts_where_they_are(
    tmp_path: Path, teacher: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = result("dmd2", {1: figures(0.5)})
    for one in (made, teacher):
        folder = tmp_path / figures_of(one)
        folder.mkdir(parents=True)
        save_file({str(n): torch.zeros(5, 3, 2, 8, 8, dtype=torch.uint8) for n in one.rows}, folder / CLIPS)
    (tmp_path / figures_of(teacher) / FILE).write_text("{}")
    shown = type("Report", (), {"previews": tuple({"prompt": f"a <{n}> ring"} for n in range(5))})
    monkeypatch.setattr("fewstep.leaderboard.page.load_report", lambda folder: shown)
    text = leaderboard.write_page([made, teacher], tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 3 * (1 + 4), "three prompts: the row at one step, the teacher at four counts"
    assert text.count("<li>") == 3 and "a &lt;2&gt; ring" in text
    assert "not on this machine" not in text


def test_the_table_says_what_it_does_not_count() -> None:
    text = heading(0.4).replace("\n", " ")
    for word in (
        "decoder and the reward networks", "heads of discriminators", "probes", "fewer blocks", "progressive, lightning",
        "over prompts, not over seeds", "meets some of", "`A+B`", "switches.py", "`ROW-BUDGET-SEED.json`", "`ROW.yaml`",
    ):  # fmt: skip
        assert word in " ".join(text.split()), word
