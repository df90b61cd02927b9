"""Every long command, stopped by Ctrl-C, SIGTERM and SIGKILL: it says what is kept, goes on, and leaves the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faults.given import RECIPE
from faults.given import teacher as tiny_teacher
from faults.making import video
from fewstep.engine.checkpoint import Checkpoint, RunState
from fewstep.engine.log import read_metrics
from fewstep.models.results import result_in
from support_stopping import fewstep

PAIR = """
model: {type: Pretrained, source: teacher}
method: {type: Consistency}
data: {type: WorldClips, num_frames: 4}
settings: {steps: 6, batch: 1, accumulate: 2, save_every: 100, log_every: 1}
"""
"""Two processes have a micro-batch each."""
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}
SIGNALS = tuple(CODES)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of results what does not depend on the clock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run: Path) -> dict[str, bytes]:
    """The result of a finished run."""
    result = result_in(run)
    assert result is not None
    return {name: data for name, data in contents(result).items() if name.endswith(".safetensors")}


def stopped(words: str, at: tuple[str, int], name: str, here: Path, *says: str) -> None:
    """Run a command that gets a signal; it must end as that signal's exit code says, in one line."""
    code, err = fewstep(*words.split(), here=here, at=(*at, name))
    assert code == CODES[name], err
    if name != "SIGKILL":
        assert "fewstep: stopped; " in err and "Traceback" not in err and all(word in err for word in says), err


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("every", [2, 0])
def test_distill(every: int, name: str, tmp_path: Path) -> None:
    """With checkpoints and without: SIGTERM makes one, whatever the interval."""
    recipe = RECIPE.replace("steps: 1", "steps: 6").replace("save_every: 1", f"save_every: {every}")
    (tmp_path / "r.yaml").write_text(recipe)
    words = "train r.yaml --quiet --output "
    kept = 4 if name == "SIGTERM" else every
    says = f"resumes from step-{kept:06d}" if kept else "settings.save_every is 0"
    stopped(f"{words}run", ("iteration", 4), name, tmp_path, says)
    for output in ("run", "straight"):
        assert fewstep(*f"{words}{output}".split(), here=tmp_path)[0] == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert not (tmp_path / "run/.running").exists()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that two processes have distilled without a stop, in `straight`."""
    here = tmp_path_factory.mktemp("two")
    tiny_teacher(here)
    (here / "r.yaml").write_text(PAIR)
    code, err = fewstep(*["distill", "r.yaml", "--quiet", "--output", "straight"], here=here, processes=2)
    assert code == 0, err
    return here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGTERM@torchrun"])
def test_two_processes_agree_on_where_to_stop(name: str, of_two: Path) -> None:
    """One of them is told, or torchrun is and tells both: both stop after the same iteration, with one whole checkpoint."""
    run = of_two / name
    words = f"distill r.yaml --quiet --output {name}".split()
    code, err = fewstep(*words, here=of_two, at=("iteration", 4, name), processes=2)
    assert code != 0 and err.count("fewstep: stopped; the same command resumes from step-000004") == 2, err
    assert Checkpoint.open(run / "checkpoints/step-000004").step == 4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"] and not (run / "student").exists()
    code, err = fewstep(*words, here=of_two, processes=2)
    assert code == 0, err
    assert weights(run) == weights(of_two / "straight") != {}
    steps = [[row["step"] for row in read_metrics(of_two / output / "metrics.jsonl")] for output in (name, "straight")]
    assert steps[0] == steps[1] == list(range(1, 7))


STREAM = """
model: {type: Pretrained, source: teacher}
method:
  type: DMD2
  critic_updates: 1
  rollout: {type: StreamingLong, stream: {window: 3, sink: 1}, grids: [[1.0, 0.5]], length: 16, overlap: 1}
data: {type: WorldClips, num_frames: 4}
settings: {steps: 3, batch: 1, accumulate: 2, save_every: 100, log_every: 1, health: null}
"""
"""Streams of five clips, two updates in an iteration: they go on over every checkpoint."""


@pytest.mark.slow
def test_streams_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Each place has its own, whoever computes it: two processes write them, one goes on with both, and the other way round."""
    tiny_teacher(tmp_path)
    (tmp_path / "r.yaml").write_text(STREAM)
    for before, after in ((2, 1), (1, 2)):
        name = f"{before}-{after}"
        words = f"distill r.yaml --quiet --output {name}".split()
        code, err = fewstep(*words, here=tmp_path, at=("iteration", 2, "SIGTERM"), processes=before)
        assert code != 0, err
        stored = RunState.load(tmp_path / name / "checkpoints/step-000002").components["carried"]
        assert {key[0] for key in stored} == {"0", "1"}
        assert not torch.equal(stored["0/stream/seeds"], stored["1/stream/seeds"])
        code, err = fewstep(*words, here=tmp_path, processes=after)
        assert code == 0, err
    states = [RunState.load(tmp_path / name / "checkpoints/step-000003") for name in ("2-1", "1-2")]
    assert [state.components["carried"]["1/stream/clip"] for state in states] == [1, 1]
    seeds = [state.components["carried"]["1/stream/seeds"] for state in states]
    assert torch.equal(*seeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("at", [("row", 4), ("shard", 1)])
def test_prepare(name: str, at: tuple[str, int], tmp_path: Path) -> None:
    tiny_teacher(tmp_path)
    (tmp_path / "videos").mkdir()
    for i in range(70):  # two parts of 64 and 6 videos, a shard each
        (tmp_path / f"videos/{i:02d}.mp4").write_bytes(video())
        (tmp_path / f"videos/{i:02d}.txt").write_text(f"film {i}")
    words = "prepare videos --model teacher --quiet --output "
    stopped(f"{words}out", at, name, tmp_path, "continues after the last complete file")
    for output in ("out", "straight"):
        assert fewstep(*f"{words}{output}".split(), here=tmp_path)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("at", [("row", 5), ("shard", 2)])
def test_pairs(name: str, at: tuple[str, int], tmp_path: Path) -> None:
    tiny_teacher(tmp_path)
    words = "pairs world:6 --model teacher --times 1 0 --steps 2 --batch 2 --shard-size 2 --quiet --output "
    stopped(f"{words}out", at, name, tmp_path, "continues after the last complete file")
    for output in ("out", "straight"):
        assert fewstep(*f"{words}{output}".split(), here=tmp_path)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_evaluate(name: str, tmp_path: Path) -> None:
    tiny_teacher(tmp_path)
    words = "evaluate teacher --teacher teacher --num-inference-steps 2 --prompts 4 --seeds 1 --features pooled --output out"
    stopped(words, ("batch", 2), name, tmp_path, "1 finished row is kept")
    (kept,) = (tmp_path / "out/rows").iterdir()
    assert kept.suffix == ".safetensors"
    code, err = fewstep(*words.split(), here=tmp_path)
    assert code == 0, err
    assert "teacher 50" not in err  # its clips were not made again
    assert not (tmp_path / "out/rows").exists() and (tmp_path / "out/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_sample(name: str, tmp_path: Path) -> None:
    tiny_teacher(tmp_path)
    (tmp_path / "p.txt").write_text("a duck\n" * 10)
    words = "sample teacher --prompt-file p.txt --num-inference-steps 1 --force --output c.gif"
    stopped(words, ("film", 2), name, tmp_path, "8 of 10 files are written", "c-08.gif")
    assert len(list(tmp_path.glob("c-*.gif"))) == 8


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path) -> None:
    """The second is refused while the first goes on, and the first is as if it had been alone."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("steps: 1", "steps: 4").replace("save_every: 1", "save_every: 2"))
    words = ["train", "r.yaml", "--quiet", "--output"]
    support = Path(__file__).with_name("support_stopping.py")
    first = subprocess.Popen([sys.executable, support, "iteration", "2", "SIGSTOP", *words, "run"], cwd=tmp_path)
    os.waitpid(first.pid, os.WUNTRACED)  # it stands in its second iteration
    try:
        code, err = fewstep(*words, "run", here=tmp_path)
        assert code == 2 and f"run is in use by another fewstep (process {first.pid} on" in err
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert fewstep(*words, "straight", here=tmp_path)[0] == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "straight/metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "says"),
    [("> /dev/full", 2, "standard output: No space left on device"), (">&-", 0, ""), ("| true", 2, "standard output")],
)
@pytest.mark.parametrize(
    "words", ["list methods", "sample teacher --prompt duck --num-inference-steps 1 --force --output a.gif"]
)
def test_standard_output_that_takes_nothing(words: str, end: str, code: int, says: str, tmp_path: Path) -> None:
    """What was made is there, and one line says what is wrong."""
    tiny_teacher(tmp_path)
    line = f"{sys.executable} -m fewstep {words} {end}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == bool(says) and "Traceback" not in done.stderr
    assert (tmp_path / "a.gif").is_file() == words.startswith("sample")
