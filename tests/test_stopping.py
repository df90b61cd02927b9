"""What is kept of work that is stopped, and who may work where: SIGTERM, Ctrl-C, locks, full disks, outputs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from faults.given import RECIPE
from faults.given import teacher as tiny_teacher
from fewstep.cli import main
from fewstep.core import atomic
from fewstep.core.lock import FILE, FolderInUse, holding
from fewstep.core.stopping import Terminated, on_request, saying
from fewstep.diffusion import Step
from fewstep.engine.checkpoint import checkpoints
from fewstep.engine.run import Run
from fewstep.evaluate import Suite, entries, evaluate, sampling
from fewstep.models import VideoModel
from fewstep.recipe import Recipe, RecipeError

STEPS = 5
pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`r.yaml` of five steps, without checkpoints in between, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("steps: 1", f"steps: {STEPS}").replace("save_every: 1", "save_every: 100"))
    return path


@contextmanager
def signalled(number: int, step: int) -> Iterator[None]:
    """The process gets a signal in the middle of an iteration."""
    real = Run.iterate

    def iterate(run: Run) -> None:
        if run.step == step:
            os.kill(os.getpid(), number)
        real(run)

    with patch.object(Run, "iterate", iterate):
        yield


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, " ".join(capsys.readouterr().err.split())


# --- distill ----------------------------------------------------------------------------------------------------------


def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", recipe, "--quiet", "--output")
    with signalled(signal.SIGTERM, 2):
        assert said(capsys, *words, "run") == (143, "fewstep: stopped; the same command resumes from step-000003")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in checkpoints(Path("run/checkpoints"))] == ["step-000003"]
    assert not Path("run/teacher").exists()
    assert said(capsys, *words, "run")[0] == said(capsys, *words, "straight")[0] == 0
    for name in ("denoiser", "text", "codec"):
        stopped, straight = (Path(run, f"teacher/{name}.safetensors").read_bytes() for run in ("run", "straight"))
        assert stopped == straight


def test_ctrl_c_says_what_is_there_to_go_on_from(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with signalled(signal.SIGINT, 3):
        code, err = said(capsys, "train", recipe, "--quiet", "--output", "run")
        assert (
            code == 130 and "no checkpoint yet (the first comes after 100 steps)" in err and "from the beginning" in err
        )
        code, err = said(capsys, "train", recipe, "--quiet", "--output", "saved", "--settings.save-every", 2)
        assert (code, err) == (130, "fewstep: stopped; the same command resumes from step-000002")


def test_a_second_sigterm_stops_at_once() -> None:
    """Unless it is the first one's echo: under torchrun a scheduler's signal comes twice."""
    with on_request() as stop, patch.object(time, "monotonic", side_effect=[10.0, 10.9, 11.1]):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            pytest.fail("the echo of a signal is taken for a second one")
        assert stop.made
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_innermost_work_says_what_is_kept() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^inner$"), saying(lambda: "outer"), saying(lambda: "inner"):
        raise KeyboardInterrupt
    with pytest.raises(Terminated, match=r"^outer$"), saying(lambda: "outer"):
        raise Terminated


def test_a_run_without_a_checkpoint_gives_its_folder_to_another_recipe(recipe: Path) -> None:
    with signalled(signal.SIGINT, 2), pytest.raises(KeyboardInterrupt):
        Recipe.load(recipe).run("run", quiet=True)
    shorter = Recipe.load(recipe, [("settings.steps", "2")])
    shorter.run("run", quiet=True)
    assert Recipe.load("run").hash == shorter.hash
    with pytest.raises(RecipeError, match=r"settings.steps: 2 -> 5"):
        Recipe.load(recipe).run("run", quiet=True)


# --- locks ------------------------------------------------------------------------------------------------------------


def test_one_command_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with holding(tmp_path / "run"):
        refused = pytest.raises(FolderInUse, match=rf"run is in use by another fewstep \(process {os.getpid()} on ")
        with refused, holding(tmp_path / "run"):
            pass
        with holding(tmp_path / "other"):
            pass
    with holding(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    lines = [
        "import os, signal", "from pathlib import Path", "from fewstep.core.lock import holding",
        f"with holding(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)",
    ]  # fmt: skip
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / FILE).is_file()
    with holding(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, "No locks available")), holding(tmp_path):
        pass
    assert "file system without locks" in caplog.text


def test_an_error_without_a_name_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="run") as raised, holding(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC


# --- evaluate ---------------------------------------------------------------------------------------------------------

SUITE = Suite(prompts=4, seeds_per_prompt=1, batch=4, features="pooled", latency_runs=3, latency_budget=0.1, previews=1)


def test_an_evaluation_goes_on_after_its_finished_rows(tmp_path: Path) -> None:
    model = VideoModel.from_pretrained(tiny_teacher(tmp_path))
    rows = entries(model, model, (2, 1))
    drawn: list[str] = []
    real = sampling.sample

    def sample(entry: object, *rest: object) -> object:
        drawn.append(entry.name)  # type: ignore[attr-defined]
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(entry, *rest)  # type: ignore[arg-type]

    with patch("fewstep.evaluate.run.sample", sample):
        with pytest.raises(KeyboardInterrupt, match="2 finished rows are kept"):
            evaluate(rows, SUITE, tmp_path / "out")
        kept = sorted((tmp_path / "out/rows").iterdir())
        (tmp_path / "out/rows/mine.txt").write_text("of somebody else")
        damaged = min(kept, key=lambda path: path.stat().st_mtime_ns)
        damaged.write_bytes(damaged.read_bytes()[:50])
        report = evaluate(rows, SUITE, tmp_path / "out")
    names = [row.name for row in rows]
    assert drawn == [*names[:3], names[0], *names[2:]]
    assert [path.name for path in (tmp_path / "out/rows").iterdir()] == ["mine.txt"]
    straight = evaluate(rows, SUITE, tmp_path / "straight")
    for row, other in zip(report.rows, straight.rows, strict=True):
        assert (row.accuracy, row.frechet, row.motion, row.diversity) == (
            other.accuracy, other.frechet, other.motion, other.diversity,
        )  # fmt: skip


def test_figures_of_other_prompts_are_not_written_over(tmp_path: Path) -> None:
    from dataclasses import replace

    model = VideoModel.from_pretrained(tiny_teacher(tmp_path))
    rows = entries(model, model, (1,))
    evaluate(rows, SUITE, tmp_path / "out")
    evaluate(rows, SUITE, tmp_path / "out")
    before = (tmp_path / "out/results.json").read_bytes()
    with pytest.raises(FileExistsError, match="other prompts or settings"):
        evaluate(rows, replace(SUITE, prompts=5), tmp_path / "out")
    with pytest.raises(FileExistsError, match="other models"):
        evaluate(entries(model, model, (2,)), SUITE, tmp_path / "out")
    assert (tmp_path / "out/results.json").read_bytes() == before


# --- sample -----------------------------------------------------------------------------------------------------------


def frames_of(path: Path) -> tuple[int, int]:
    from fewstep.data.video import read_video

    return tuple(read_video(path, 1).shape[1:3])  # type: ignore[return-value]


def test_many_clips_are_files_of_their_own(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_teacher(Path())
    Path("p.txt").write_text("".join(f"a duck {i}\n" for i in range(11)))
    words = ("--num-inference-steps", 1, "--force", "--output")
    assert main([str(w) for w in ("sample", "teacher", "--prompt-file", "p.txt", *words, "many/c.mp4")]) == 0
    names = [f"c-{i:02d}.mp4" for i in range(1, 12)]
    assert sorted(path.name for path in Path("many").iterdir()) == names
    assert capsys.readouterr().out.split() == [f"many/{name}" for name in names]
    assert frames_of(Path("many/c-01.mp4")) == (128, 128)  # 32 x 32, enlarged to what one can see
    assert main([str(w) for w in ("sample", "teacher", "--prompt", "a duck 9", "--seed", 9, *words, "one.mp4")]) == 0
    assert Path("one.mp4").read_bytes() == Path("many/c-10.mp4").read_bytes()  # with the prompt's own seed
    assert main([str(w) for w in ("sample", "teacher", "--prompt", "a", "b", "c", *words, "few.gif")]) == 0
    assert frames_of(Path("few.gif")) == (128, 384)


def test_clips_that_are_done_stay_when_the_rest_is_stopped(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_teacher(Path())
    Path("p.txt").write_text("a duck\n" * 11)
    real, calls = VideoModel.sampling, []

    def sampling(model: VideoModel, prompts: list[str], **options: object) -> Iterator[Step]:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, prompts, **options)  # type: ignore[arg-type]

    with patch.object(VideoModel, "sampling", sampling):
        code, err = said(capsys, "sample", "teacher", "--prompt-file", "p.txt", "--output", "c.gif")
    assert calls == [8, 3] and code == 130
    assert err == "fewstep: stopped; 8 of 11 files are written, the last one is c-08.gif"
    assert len(list(Path().glob("c-*.gif"))) == 8


def test_a_clip_whose_place_is_gone_is_kept_elsewhere(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from faults.sampling import only_temporary

    tiny_teacher(Path())
    with only_temporary():
        code, err = said(capsys, "sample", "teacher", "--prompt", "a duck", "--output", "c.gif")
    assert code == 2 and err.startswith("fewstep: c.gif: No space left on device")
    spare = Path(err.partition("The clips were written to ")[2].partition(" instead")[0])
    assert frames_of(spare) == (128, 128)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "any").touch()
    with atomic.replacing_folder(tmp_path / "model") as draft:
        save_file({"x": torch.zeros(1)}, draft / "x.safetensors")
    with atomic.replacing(tmp_path / "x.safetensors") as draft:
        save_file({"x": torch.zeros(1)}, draft)
    model = VideoModel.from_pretrained(tiny_teacher(tmp_path)).save(tmp_path / "saved")
    for path in (tmp_path / "model/x.safetensors", tmp_path / "x.safetensors", *model.iterdir()):
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode, path


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "é" * 125 + ".txt"):
        atomic.write_text(tmp_path / name, "whole")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
        (tmp_path / name).unlink()


def test_rows_that_name_a_video_again_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fewstep.data.listing import write_listing

    table = tmp_path / "captions.csv"
    table.write_text("video,caption\na.mp4,x\na.mp4,y\nb.mp4,z\nb.mp4,z\n")
    with caplog.at_level(logging.WARNING):
        assert len(write_listing(tmp_path / "listing.jsonl", tmp_path)) == 4
    assert (
        "1 rows give a different caption to a video of an earlier row (such as a.mp4); all rows are used" in caplog.text
    )
