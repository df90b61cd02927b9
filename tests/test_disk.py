"""Free disk space is compared with what a command will write, before it begins."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Literal

import pytest

from fewstep.core.disk import require_space, size_of
from fewstep.data import PairPlan, make_pairs, pairs_cost
from fewstep.engine import Optim, Settings, train
from fewstep.engine.checkpoint import RunState, checkpoints
from fewstep.engine.prepare import prepare
from fewstep.engine.run import Run
from fewstep.engine.space import checkpoint_bytes, require_disk, student_bytes
from support_engine import CASES, Everything, small, tiny_model

PLAN = PairPlan(times=(1.0, 0.5, 0.0), steps=2)
PROMPTS = ("a red ball", "a blue box")
Usage = namedtuple("Usage", "total used free")


def leave(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Every disk has so many bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * free, free, free))


def run_of(settings: Settings, output: Path) -> Run:
    return prepare(tiny_model(), CASES["DMD2"], Everything(), settings, output)


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(20, 10, 10))
    require_space(tmp_path / "not" / "yet", 10, "a clip")
    assert asked == [tmp_path]
    with pytest.raises(OSError, match=r"a clip: .* will be written, and this disk has .* free") as caught:
        require_space(tmp_path, 11, "a clip")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


def test_a_folder_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(bytes(5))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(7))
    assert size_of(tmp_path) == 12 and size_of(tmp_path / "gone") == 0


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_estimate_is_what_a_run_writes(optim: Literal["adamw", "muon"], tmp_path: Path) -> None:
    settings = small(4, ema=0.9, optim={"student": Optim(type=optim)})
    run = run_of(settings, tmp_path)
    train(tiny_model(), CASES["DMD2"], Everything(), settings, tmp_path, quiet=True)
    saved = RunState.load(checkpoints(tmp_path / "checkpoints")[-1]).components.values()
    tensors = [t for component in saved for t in component.values()]
    counters = [t for t in tensors if t.dim() == 0]  # the optimisers' numbers of steps
    assert checkpoint_bytes(run) == sum(t.nbytes for t in tensors) - sum(t.nbytes for t in counters)
    weights = sum(file.stat().st_size for file in (tmp_path / "student").glob("*.safetensors"))
    assert student_bytes(run) <= weights <= 1.2 * student_bytes(run)  # each file has a header


def test_a_run_that_does_not_fit_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(9, save_every=1, keep_last=2)
    run = run_of(settings, tmp_path)
    needed = 3 * checkpoint_bytes(run) + student_bytes(run)  # two are kept while the next one is written
    leave(monkeypatch, needed - 1)
    with pytest.raises(OSError, match="checkpoints and students"):
        train(tiny_model(), CASES["DMD2"], Everything(), settings, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    leave(monkeypatch, needed)
    require_disk(run)


def test_a_resumed_run_needs_only_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(small(9, save_every=0), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "held").write_bytes(bytes(1000))
    leave(monkeypatch, checkpoint_bytes(run) + student_bytes(run) - 1000)
    require_disk(run)
    leave(monkeypatch, checkpoint_bytes(run) + student_bytes(run) - 1001)
    with pytest.raises(OSError, match="free"):
        require_disk(run)


def test_pairs_that_do_not_fit_are_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    needed = pairs_cost(model, len(PROMPTS), PLAN).bytes
    leave(monkeypatch, needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.denoiser), "forward", lambda *_: pytest.fail("the teacher runs"))
        with pytest.raises(OSError, match="2 pairs: .* will be written"):
            make_pairs(model, PROMPTS, tmp_path / "pairs", PLAN)
    leave(monkeypatch, needed)
    assert make_pairs(model, PROMPTS, tmp_path / "pairs", PLAN).pairs == 2
