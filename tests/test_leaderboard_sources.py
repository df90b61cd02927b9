"""What the leaderboard's figures, verdicts and codes are taken from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep import leaderboard
from fewstep.leaderboard import TEACHER, Run, contest, contestants, runs, work
from fewstep.leaderboard.claims import Claim, judge
from fewstep.leaderboard.results import DIVISORS
from fewstep.methods import AVDM2
from support_leaderboard import figures, result
from test_leaderboard import TEACHERS
from test_leaderboard_files import ROWS


def test_intervals_that_touch_are_not_told_apart() -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2)
    rows = [result("a", {2: figures(0.75, width=0.125)}), result("b", {2: figures(0.5, width=0.125)})]
    assert judge(claim, rows, figures(0.9)).outcome == "not told apart"


@pytest.mark.parametrize(("figure", "near", "far"), [("diversity", 0.436, 0.444), ("motion", 0.0547, 0.0558)])
def test_a_tenth_is_the_interval_of_a_figure_without_one(figure: Any, near: float, far: float) -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2, figure=figure)
    base = replace(figures(0.5), motion=0.05, diversity=0.4)
    for value, told in ((near, "not told apart"), (far, "confirmed" if figure == "diversity" else "contradicted")):
        rows = [result("a", {2: replace(base, **{figure: value})}), result("b", {2: base})]
        assert judge(claim, rows, base).outcome == told


def test_a_verdict_tells_the_means_of_its_seeds() -> None:
    claim = Claim(cite="", text="", better="a", worse="b", steps=2)
    rows = [result("a", {2: figures(0.8)}), result("a", {2: figures(0.6)}, seed=1), result("b", {2: figures(0.5)})]
    found = judge(claim, rows, figures(0.9))
    assert (found.better, found.worse) == (pytest.approx(0.7), 0.5)


def test_a_row_that_lost_its_diversity_falls() -> None:
    stored, made = (result("a", {4: replace(figures(0.8), diversity=d)}) for d in (0.4, 0.2))
    assert leaderboard.fallen(stored, made, TEACHERS) == ["diversity in 4 steps: 0.50, was 1.00"]


def test_the_table_names_rows_whose_code_has_changed(tmp_path: Path) -> None:
    one = contestants()["dmd2"]
    rows = {n: figures(0.5) for n in (4, 2, 1)}
    teacher = result(TEACHER, {50: figures(0.9), **rows}, budget=0.0)
    for code, named in ((one.code, False), ("c", True)):
        made = replace(result("dmd2", rows), code=code)
        text = leaderboard.write_table([teacher, made], tmp_path / "t.md").read_text(encoding="utf-8")
        assert ("changed since: dmd2." in text) == named


def test_the_page_has_the_best_row_first_the_first_seed_and_one_budget_a_section(tmp_path: Path) -> None:
    teacher = result(TEACHER, {50: figures(0.97), 4: figures(0.03), 2: figures(0.02), 1: figures(0.01)}, budget=0.0)
    made = [
        result("low", {n: figures(0.31) for n in (4, 2, 1)}),
        result("high", {n: figures(0.71) for n in (4, 2, 1)}),
        result("high", {n: figures(0.82) for n in (4, 2, 1)}, seed=1),
        result("low", {n: figures(0.93) for n in (4, 2, 1)}, budget=2.0),
        result("high", {n: figures(0.44) for n in (4, 2, 1)}, budget=2.0),
    ]
    text = leaderboard.write_page([*made, teacher], tmp_path, tmp_path / "p.html").read_text(encoding="utf-8")
    first, second = text.index("<h2>The demo's budget"), text.index("<h2>2 times the demo's budget")
    one, two = text[first:second], text[second:]
    assert one.index("<th>high") < one.index("<th>low") and two.index("<th>low") < two.index("<th>high")
    assert "71 %" in one and "82 %" not in one and "93 %" not in one
    assert "93 %" in two and "71 %" not in two
    whole = one[one.index("teacher at 50 steps") :]
    assert whole.index("97 %") < whole.index("3 %")


def test_code_is_that_of_the_teacher_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = contestants()["dmd2"].code
    monkeypatch.setattr(contest, "teacher_code", lambda: "another")
    assert contestants()["dmd2"].code != before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dmd2", "methods/gan.py"),
        ("dmd2", "methods/motion.py"),
        ("dmd2", "matching/base.py"),
        ("dmd2", "matching/reverse_kl.py"),
        ("dmd2", "rollouts/base.py"),
        ("dmd2", "rollouts/grids.py"),
        ("avdm2", "methods/frames.py"),
        ("f_distill", "matching/reverse_kl.py"),
        ("flash_dmd", "feedback/pso.py"),
        ("flash_dmd", "methods/rewards.py"),
        ("pso", "methods/dmd2.py"),
        ("pso", "feedback/random_step.py"),
        ("twin_flow", "methods/flow_matching.py"),
    ],
)
def test_code_is_that_of_all_stages_and_of_the_formulas_that_they_call(
    monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    before, read = contestants()[name].code, Path.read_text

    def changed(path: Path, *args: Any, **options: Any) -> str:
        return read(path, *args, **options) + ("\nCHANGED = 1\n" if path.as_posix().endswith(file) else "")

    monkeypatch.setattr(contest.Path, "read_text", changed)
    assert contestants()[name].code != before


@pytest.mark.parametrize("name", DIVISORS)
def test_what_divides_are_the_teachers_figures_at_its_own_steps(tmp_path: Path, name: str) -> None:
    fine = {50: figures(0.9), **ROWS, 1: replace(figures(0.5), **{name: 0.0})}
    result(TEACHER, fine, budget=0.0).save(tmp_path)
    leaderboard.load_results(tmp_path)
    lacking = {**ROWS, 50: replace(figures(0.9), **{name: 0.0})}
    result(TEACHER, lacking, budget=0.0).save(tmp_path)
    with pytest.raises(ValueError, match=f"lacks the teacher's {name} at its own steps"):
        leaderboard.load_results(tmp_path)


def test_frames_count_by_those_of_the_datas_clips() -> None:
    one = contestants()["dmd2"].recipe
    recipe = replace(one, method=AVDM2())
    short = replace(recipe, data=replace(recipe.data, num_frames=8))
    framed = {w.frames for w in recipe.method.cost()} - {0}
    assert framed and work(short) > work(recipe)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_row_is_trained_with_its_seed(seed: int) -> None:
    assert Run(contestants()["dmd2"], seed=seed).prepared().settings.seed == seed


def test_figures_are_those_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of steps has a row of its own in the evaluation, and each figure its own column."""

    def evaluated(entries: Any, suite: Any, folder: Path) -> Any:
        rows = {
            e.name: SimpleNamespace(
                name=e.name, accuracy=e.steps / 100, accuracy_ci=(0.0, 1.0), frechet=e.steps + 0.1, frechet_ci=None,
                motion_absolute=e.steps + 0.2, diversity_absolute=e.steps + 0.3, flicker_absolute=e.steps + 0.4,
            )
            for e in entries
        }  # fmt: skip
        return SimpleNamespace(row=rows.__getitem__, frechet_floor=0.7)

    monkeypatch.setattr(runs, "evaluate", evaluated)
    made = leaderboard.measure_teacher(tmp_path, tmp_path / "runs", suite=runs.SUITE)
    assert (made.floor, sorted(made.rows), made.code) == (0.7, [1, 2, 4, 50], runs.teacher_code())
    for n, row in made.rows.items():
        assert (row.accuracy, row.frechet) == (n / 100, n + 0.1)
        assert (row.motion, row.diversity, row.flicker) == (n + 0.2, n + 0.3, n + 0.4)
    assert leaderboard.load_results(tmp_path) == [made] and leaderboard.teacher_measured(tmp_path)
