"""`fewstep leaderboard`: what it refuses before the first run, what it runs, and what it leaves to other processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fewstep import leaderboard
from fewstep.cli import main
from fewstep.core.lock import FolderInUse
from fewstep.leaderboard import TEACHER, Result, Run, contestants
from support_leaderboard import figures, result

ROWS = {4: figures(0.8), 2: figures(0.7), 1: figures(0.5)}


@dataclass
class Bench:
    """The command in a folder of its own, with runs that take no time."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    made: list[str] = field(default_factory=list)
    """What was run, in order."""
    before: Callable[[Run], None] = lambda run: None
    """Called at the beginning of each run."""

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = main(["leaderboard", *words, "--results", str(self.results), "--runs", str(self.folder / "runs"),
                     "--table", str(self.folder / "table.md")])  # fmt: skip
        captured = self.capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    def run(self, this: Run, results: Path, folder: Path, *, quiet: bool) -> Result:
        self.before(this)
        self.made.append(this.file)
        made = replace(self.result(this), code=this.contestant.code)
        made.save(results)
        return made

    def result(self, this: Run) -> Result:
        return result(this.contestant.name, ROWS, budget=this.budget, seed=this.seed)

    def teacher(self, results: Path, folder: Path) -> Result:
        self.made.append(TEACHER)
        made = result(TEACHER, {50: figures(0.9), **ROWS}, budget=0.0)
        made.save(results)
        return made


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path, capsys)
    monkeypatch.setattr(leaderboard, "run", made.run)
    monkeypatch.setattr(leaderboard, "measure_teacher", made.teacher)
    monkeypatch.setattr(leaderboard, "teacher_measured", lambda results: (results / "teacher.json").is_file())
    return made


def test_the_teacher_is_measured_before_the_first_run(bench: Bench) -> None:
    code, _, err = bench("dmd2")
    assert (code, err) == (0, "")
    assert bench.made == ["teacher", "dmd2-1-0.json"]
    assert "| dmd2 |" in (bench.folder / "table.md").read_text(encoding="utf-8")
    assert "dmd2" in (bench.folder / "runs" / "leaderboard.html").read_text(encoding="utf-8")
    bench("dmd2", "tdm")
    assert bench.made[2:] == ["tdm-1-0.json"], "the rest is there"
    assert "2 of 2 runs are there" in bench("dmd2", "tdm")[1]


def test_teacher_alone_and_all_rows(bench: Bench) -> None:
    assert bench("teacher")[0] == 0
    assert bench.made == ["teacher"]
    assert bench()[0] == 0
    assert sorted(bench.made[1:]) == sorted(f"{name}-1-0.json" for name in contestants())


def test_what_is_named_twice_is_run_once(bench: Bench) -> None:
    code, out, _ = bench("dmd2", "tdm", "dmd2", "--seeds", "0", "1", "0", "--budget", "2", "2.0")
    assert code == 0 and "0 of 4 runs" in out
    assert bench.made[1:] == ["dmd2-2-0.json", "tdm-2-0.json", "dmd2-2-1.json", "tdm-2-1.json"]


def test_show_runs_nothing(bench: Bench) -> None:
    code, _, err = bench("--show")
    assert code == 2 and "run fewstep leaderboard teacher" in err
    bench("dmd2")
    made = list(bench.made)
    assert bench("--show")[0] == 0
    assert bench.made == made


@pytest.mark.parametrize("budget", ["inf", "nan", "0", "-1"])
def test_a_budget_that_is_none_is_refused(bench: Bench, budget: str) -> None:
    code, _, err = bench("dmd2", f"--budget={budget}")
    assert code == 2 and "a budget is a number above 0 and at most 1000" in err
    assert bench.made == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--seeds", "1000"), "from 0 to 999"),
        (("dmd2", "--seeds"), "--seeds has no value"),
        (("dmd2", "--budget"), "--budget has no value"),
        (("dmd3",), "no such row: dmd3; did you mean dmd?"),
        (("leaderboard/sid",), "no such row: leaderboard/sid; did you mean sid?"),
        (("dmd2_gan+r2",), "choose from dmd2_gan, dmd2_gan+weight_0.1, dmd2_gan+r1, dmd2_gan+block_head"),
        (("nothing-like-it",), "choose from teacher, add,"),
    ],
)
def test_a_seed_and_a_row_that_do_not_exist_are_refused(bench: Bench, words: tuple[str, ...], reason: str) -> None:
    code, _, err = bench(*words)
    assert code == 2 and reason in err
    assert bench.made == []


def test_a_row_that_the_budget_does_not_pay_for_is_refused_before_the_first_run(bench: Bench) -> None:
    code, _, err = bench("consistency", "phased_dmd", "--budget", "0.0001")
    assert code == 2 and "budget 0.0001, seed 0: the budget pays for less than one iteration" in err
    assert bench.made == []


def test_a_damaged_file_is_refused_before_the_first_run(bench: Bench) -> None:
    bench.results.mkdir()
    (bench.results / "sid-1-0.json").write_text("{")
    code, _, err = bench("dmd2")
    assert code == 2 and "sid-1-0.json cannot be read" in err and "Delete it" in err
    assert bench.made == []


@pytest.mark.parametrize("taken", ["results", "runs", "table.md"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_run(bench: Bench, taken: str) -> None:
    if taken == "table.md":
        (bench.folder / taken).mkdir()
    else:
        (bench.folder / taken).write_text("a file")
    code, _, err = bench("dmd2")
    assert code == 2 and taken in err and "directory" in err
    assert bench.made == []


def test_a_row_of_another_process_is_left_to_it(bench: Bench) -> None:
    def busy(this: Run) -> None:
        if this.contestant.name == "dmd2":
            raise FolderInUse("runs/dmd2 is in use by another fewstep (process 7)")

    bench.before = busy
    code, out, _ = bench("dmd2", "tdm")
    assert code == 0 and "left to another process" in out and "process 7" in out
    assert bench.made == ["teacher", "tdm-1-0.json"]


def test_a_row_that_another_process_has_finished_meanwhile_is_not_run(bench: Bench) -> None:
    def other(this: Run) -> None:
        tdm = Run(contestants()["tdm"])
        replace(bench.result(tdm), code=tdm.contestant.code).save(bench.results)

    bench.before = other
    assert bench("dmd2", "tdm")[0] == 0
    assert bench.made == ["teacher", "dmd2-1-0.json"]


def test_a_changed_row_that_falls_is_named(bench: Bench) -> None:
    bench.results.mkdir()
    result("dmd2", {4: figures(0.95), 2: figures(0.7), 1: figures(0.5)}).save(bench.results)
    _, out, _ = bench("dmd2")
    assert "worse than before: accuracy in 4 steps: 0.80, was 0.95" in out
