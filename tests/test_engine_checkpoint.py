"""A killed run goes on bit for bit, whenever it was killed; a checkpoint that cannot be trusted is refused by name."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fewstep
from fewstep.core import build
from fewstep.core.atomic import discard, recover
from fewstep.core.finite import NonFiniteError
from fewstep.engine import CheckpointError, Health, Optim, Settings, checkpoint, train
from fewstep.engine.checkpoint import Checkpoint, RunState, Saver, checkpoints, prune
from fewstep.engine.log import read_metrics
from fewstep.engine.prepare import prepare
from fewstep.engine.run import Run
from fewstep.methods import METHODS, FlowMatching, Method
from fewstep.models import Card, VideoModel, fingerprint
from fewstep.models.results import result_in
from fewstep.written import names
from support_engine import CASES, Everything, die, long_run, short_run, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
OF_NO_RUN: dict[str, Any] = {"identity": {}}
"""The values of a state, where they say nothing."""


class Stopped(Exception):
    """The plug was pulled."""


@dataclass
class Plug:
    """A probe that ends the process' work at iteration `at`, after which nothing is saved."""

    at: int
    every: int = 1
    calls: int = 0

    def check(self, card: Card, part: str) -> None: ...

    def __call__(self, student: VideoModel) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.at:
            raise Stopped
        return {"rule": 0.0}

    def better(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
        return False


def last_state(output: Path) -> RunState:
    return RunState.load(checkpoints(output / "checkpoints")[-1])


def assert_same_state(a: RunState, b: RunState) -> None:
    assert (a.step, a.values) == (b.step, b.values)
    assert a.components.keys() == b.components.keys()
    for name, tensors in a.components.items():
        assert tensors.keys() == b.components[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, b.components[name][key]), f"{name}: {key}"


def figures(output: Path) -> list[dict[str, float]]:
    """The log without the clock and the plug's verdicts."""
    rows = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("time", "probe/rule")} for row in rows]


def run(output: Path, method: Method, settings: Settings, plug: int = 0) -> None:
    train(tiny_model(), method, Everything(), settings, output, quiet=True, probe=Plug(plug) if plug else None)


def test_every_method_has_a_case() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_a_checkpoint_changes_no_bit(case: str, tmp_path: Path) -> None:
    """Of every method, with whatever state it has: the last two iterations again, from the checkpoint before them."""
    short_run(tmp_path, case, 4)
    end, rows, made = last_state(tmp_path), figures(tmp_path), result_in(tmp_path)
    assert made is not None
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    shutil.rmtree(made)
    discard(checkpoints(tmp_path / "checkpoints")[-1])
    assert checkpoint_step(tmp_path) == end.step - 2
    short_run(tmp_path, case, 4)
    assert_same_state(end, last_state(tmp_path))
    assert figures(tmp_path) == rows
    assert {file.name: file.read_bytes() for file in made.iterdir()} == files


KILLED = ("DMD2-everything",)
"""Cases that are killed among the quick tests; what differs between methods is their state, which the test above restores."""


@pytest.mark.parametrize(
    "case", [case if case in KILLED else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_being_killed_and_going_on_changes_no_bit(case: str, tmp_path: Path) -> None:
    short_run(tmp_path / "straight", case, 5)
    die(short_run, "iteration", 5, tmp_path / "killed", case, 5)
    assert checkpoint_step(tmp_path / "killed") in (2, 4)  # saving goes on beside the training
    short_run(tmp_path / "killed", case, 5)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "killed"))
    assert figures(tmp_path / "straight") == figures(tmp_path / "killed")
    made = result_in(tmp_path / "straight")
    assert made is not None
    for file in made.iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / made.name / file.name).read_bytes()


def test_sigkill_at_any_moment_changes_no_bit(tmp_path: Path) -> None:
    long_run(tmp_path / "straight")
    steps = []
    for moment, number in (("file", 8), ("update", 13), ("rename", 5)):
        die(long_run, moment, number, tmp_path / "killed")
        steps.append(checkpoint_step(tmp_path / "killed"))
        print(f"killed at {moment} {number}: goes on from step {steps[-1]}")
    # Saving goes on beside the training: the checkpoint of step 6 may or may not have been complete at update 13.
    assert steps[0] == 2 and steps[1] in (4, 6) and steps[2] > steps[1]
    long_run(tmp_path / "killed")
    state = last_state(tmp_path / "killed")
    assert set(state.components) == {"student", "student.optim", "critic", "critic.optim", "ema"}
    assert_same_state(last_state(tmp_path / "straight"), state)
    assert figures(tmp_path / "straight") == figures(tmp_path / "killed")


def checkpoint_step(output: Path, folder: str = "checkpoints") -> int:
    found = checkpoints(output / folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.mark.parametrize("file", ["student", "student.optim"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, settings = CASES["Consistency"], small(6, save_every=2)
    write = checkpoint.write_component

    def torn(tensors: dict[str, torch.Tensor], path: Path, group: None) -> None:
        write(tensors, path, group)
        if path.name == file and "000004" in str(path):
            (shard,) = path.iterdir()
            shard.write_bytes(shard.read_bytes()[:100])
            raise Stopped

    monkeypatch.setattr(checkpoint, "write_component", torn)
    with pytest.raises(Stopped):
        run(tmp_path / "torn", method, settings)
    monkeypatch.undo()
    assert checkpoint_step(tmp_path / "torn") == 2
    run(tmp_path / "torn", method, settings)
    run(tmp_path / "straight", method, settings)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "torn"))
    names = {path.name for path in (tmp_path / "torn" / "checkpoints").iterdir()}
    assert names == {"step-000004", "step-000006"}  # no litter


def test_a_component_that_cannot_be_trusted_is_named(tmp_path: Path) -> None:
    method, settings = CASES["DMD2"], small(4, save_every=2)
    with pytest.raises(Stopped):
        run(tmp_path, method, settings, plug=3)
    folder = tmp_path / "checkpoints" / "step-000002"
    (component,) = (folder / "critic.optim").iterdir()
    (other,) = (folder / "student").iterdir()
    (critic,) = (folder / "critic").iterdir()
    whole, theirs = component.read_bytes(), critic.read_bytes()
    component.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"critic\.optim/.*is missing, cut short or unreadable"):
        run(tmp_path, method, settings)
    component.unlink()
    with pytest.raises(CheckpointError, match=r"critic\.optim/.*Delete"):
        run(tmp_path, method, settings)
    component.write_bytes(whole)
    critic.write_bytes(other.read_bytes())  # as long, and of a network of the same shape
    with pytest.raises(CheckpointError, match=r"critic/.*not the file that was saved here"):
        run(tmp_path, method, settings)
    critic.write_bytes(theirs)
    component.with_name("more.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"critic\.optim/more\.safetensors does not belong to this checkpoint"):
        run(tmp_path, method, settings)
    component.with_name("more.safetensors").unlink()
    (folder / "state.json").write_text('{"step": 2')
    with pytest.raises(CheckpointError, match=r"state\.json"):
        run(tmp_path, method, settings)


def test_a_component_of_another_network_is_named(tmp_path: Path) -> None:
    RunState(1, {"student": {"w": torch.ones(2, 3)}}, OF_NO_RUN).save(tmp_path)
    saved = Checkpoint.open(tmp_path / "step-000001")
    for other in ({"w": torch.ones(3, 2)}, {"w": torch.ones(2, 3), "v": torch.ones(1)}, {}):
        with pytest.raises(CheckpointError, match=r"step-000001/student belongs to another network: [vw] do"):
            saved.read("student", other)


def test_a_save_does_not_see_what_the_next_step_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are the run's own, and it goes on while they are written."""
    begin, write = threading.Event(), checkpoint.write_component

    def late(tensors: dict[str, torch.Tensor], path: Path, group: None) -> None:
        begin.wait(60)
        write(tensors, path, group)

    monkeypatch.setattr(checkpoint, "write_component", late)
    weight, values = torch.zeros(3), {"health": {"seen": 1}, **OF_NO_RUN}
    with Saver(tmp_path, keep=2) as saver:
        saver.save(RunState(1, {"student": {"w": weight}}, values))
        weight.fill_(1.0)
        values["health"]["seen"] = 2
        begin.set()
    saved = RunState.load(tmp_path / "step-000001")
    assert torch.equal(saved.components["student"]["w"], torch.zeros(3)) and saved.values["health"] == {"seen": 1}


def test_a_save_that_failed_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(OSError), Saver(tmp_path / "taken", keep=1) as saver:
        saver.save(RunState(1, {"student": {"w": torch.ones(1)}}, OF_NO_RUN))


def test_a_save_that_had_begun_is_finished_when_the_run_fails(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "run", keep=1)
    with suppress(Stopped), saver:
        saver.save(RunState(1, {"student": {"w": torch.ones(1)}}, OF_NO_RUN))
        raise Stopped
    assert checkpoint_step(tmp_path, "run") == 1


def test_a_checkpoint_holds_everything_a_run_owns(tmp_path: Path) -> None:
    method, settings = CASES["DMD2"], small(4, ema=0.9, health=Health(every=2, prompts=1))
    owner = prepare(tiny_model(), method, Everything(), settings, tmp_path)
    for _ in range(2):
        owner.iterate()
    assert owner.monitor is not None
    owner.monitor.check(owner.student(), 2)
    owner.state().save(tmp_path)
    again = prepare(tiny_model(), method, Everything(), settings, tmp_path)
    again.restore(Checkpoint.open(tmp_path / "step-000002"))
    assert again.monitor is not None and again.monitor.record == owner.monitor.record and again.step == 2
    assert_same_state(owner.state(), again.state())
    assert build(Method, owner.state().values["run"]["method"], names()) == method
    state = owner.state()
    assert set(state.components) == {"student", "student.optim", "critic", "critic.optim", "ema"}
    assert not state.components["student.optim"] and state.components["critic.optim"]  # the student has not begun


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, CASES["Consistency"], small(2))
    folder = tmp_path / "checkpoints" / "step-000002"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for where in (pickle, torch):
        monkeypatch.setattr(where, "load", refuse)
    last_state(tmp_path)


def test_a_run_goes_on_from_its_newest_checkpoint_with_all_that_it_was(tmp_path: Path) -> None:
    """In this process: the kills of the tests above are in processes of their own."""
    settings = small(4, save_every=1, keep_last=4, ema=0.9)
    whole = train(tiny_model(), CASES["FlowMatching"], Everything(), settings, tmp_path, quiet=True)
    for step in (3, 4):
        discard(tmp_path / "checkpoints" / f"step-{step:06d}")
    iterate, begun = Run.iterate, []
    with mock.patch.object(Run, "iterate", lambda run: (begun.append(run.step), iterate(run))):
        again = train(tiny_model(), CASES["FlowMatching"], Everything(), settings, tmp_path, quiet=True)
    assert begun == [2, 3] and fingerprint(again.denoiser) == fingerprint(whole.denoiser)


def test_a_checkpoint_after_the_last_iteration(tmp_path: Path) -> None:
    for every in (0, 2):
        train(
            tiny_model(),
            CASES["FlowMatching"],
            Everything(),
            small(3, save_every=every),
            tmp_path / f"{every}",
            quiet=True,
        )
        assert checkpoints(tmp_path / f"{every}" / "checkpoints")[-1].name == "step-000003"


def test_another_run_is_refused(tmp_path: Path) -> None:
    method, settings = CASES["Consistency"], small(2)
    run(tmp_path, method, settings)
    with pytest.raises(CheckpointError, match="denoiser weights was"):
        train(tiny_model(seed=1), method, Everything(), settings, tmp_path, quiet=True)
    with pytest.raises(CheckpointError, match="method digest was"):
        run(tmp_path, type(method)(decay=0.5), settings)
    with pytest.raises(CheckpointError, match="settings digest was"):
        run(tmp_path, method, small(3))
    run(tmp_path, method, settings)  # the same run: nothing left to do
    arguments = (method, Everything(), settings, tmp_path / "named")
    train(tiny_model(), *arguments, provenance={"recipe": "abc"}, quiet=True)
    with pytest.raises(CheckpointError, match="recipe was abc, is xyz"):
        train(tiny_model(), *arguments, provenance={"recipe": "xyz"}, quiet=True)


def test_checkpoints_are_in_order_of_steps_and_pruned(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        RunState(step, {"student": {}}, OF_NO_RUN).save(tmp_path)
    (tmp_path / ".draft-step-1000002").mkdir()
    (tmp_path / "step-kept-by-hand").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999998", "step-999999", "step-1000000"]
    prune(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000"]
    RunState(1_000_000, {"student": {"w": torch.ones(2)}}, OF_NO_RUN).save(tmp_path)  # replaces its namesake
    assert torch.equal(RunState.load(tmp_path / "step-1000000").components["student"]["w"], torch.ones(2))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run(tmp_path, CASES["Consistency"], small(7, save_every=2, keep_last=3))
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-000004", "step-000006", "step-000007"]
    run(tmp_path / "end", CASES["Consistency"], small(3))
    assert [p.name for p in checkpoints(tmp_path / "end" / "checkpoints")] == ["step-000003"]


def test_a_kill_while_the_best_is_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames nothing is called `best`; what was there is put back."""

    class Better(Plug):
        def better(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
            return True

    method, settings = CASES["Consistency"], small(6, save_every=2)
    arguments = (method, Everything(), settings, tmp_path / "run")
    rename, names = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        names.append(self.name)
        if names.count(".draft-best") == 4:  # the fourth best takes the place of the third
            raise Stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(Stopped):
        train(tiny_model(), *arguments, probe=Better(0), quiet=True)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "best").exists() and last_state(tmp_path / "run").values["best"]
    train(tiny_model(), *arguments, probe=Better(0), quiet=True)
    train(tiny_model(), *arguments[:3], tmp_path / "straight", probe=Better(0), quiet=True)
    weights = "denoiser.safetensors"
    ends = [(tmp_path / name / "student" / weights).read_bytes() for name in ("run", "straight")]
    assert ends[0] == ends[1]
    assert not list((tmp_path / "run").glob(".d*-best"))  # no litter


def test_only_what_was_replaced_is_recovered(tmp_path: Path) -> None:
    recover(tmp_path / "best")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".discarded-best").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "new").touch()
    recover(tmp_path / "best")  # the new one was in place: the old one is litter
    assert (tmp_path / "best" / "new").exists()


def test_warnings_are_left_alone_until_one_is_expected() -> None:
    """By importing the engine, that is; a program that does no more than that hears what it heard before."""
    program = (
        "import warnings; import fewstep.engine.loop, fewstep.engine.shard; "
        "said = [f[1].pattern for f in warnings.filters if f[1] is not None]; "
        "assert not [s for s in said if 'FSDP2' in s or 'distributed is disabled' in s], said"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fewstep.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A learning rate that is too high leaves finite losses and gradients, and weights that overflow: nothing keeps those."""
    settings = Settings(steps=1, batch=2, optim={"student": Optim(lr=1e38, weight_decay=1e38)}, health=None)
    with pytest.raises(NonFiniteError, match=r"step 1, .* of student"):
        run(tmp_path, FlowMatching(), settings)
    assert checkpoints(tmp_path / "checkpoints") == [] and not (tmp_path / "student").exists()


def test_a_byte_in_the_middle_of_a_large_file_is_noticed(tmp_path: Path) -> None:
    folder = RunState(1, {"student": {"w": torch.zeros(1 << 18)}}, OF_NO_RUN).save(tmp_path)
    file = next((folder / "student").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was saved here"):
        Checkpoint.open(folder)
