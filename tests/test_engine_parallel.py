"""Many processes do what one does: same samples, same losses, same gradients; and they come back when one is killed."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import re
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import support_parallel
from fewstep.compress import Pruned
from fewstep.core import Call, Cond, Rng
from fewstep.core.atomic import discard
from fewstep.data.base import Source
from fewstep.engine import Parallel, train
from fewstep.engine.checkpoint import Checkpoint, RunState, checkpoints
from fewstep.engine.health import read_record
from fewstep.engine.log import RunLog, read_metrics
from fewstep.engine.mesh import Processes, require_mesh
from fewstep.engine.offload import Shelf
from fewstep.engine.prepare import open_data, prepare
from fewstep.engine.shard import _let_fsdp_see_inside, hollow
from fewstep.engine.views import Views
from fewstep.methods import METHODS, Method
from fewstep.models import State, VideoDiT, VideoModel, adapters, fingerprint
from fewstep.models.spread import Spread
from support_engine import CASES, Everything, small, tiny_model
from support_parallel import EXAMINED, PER_FRAME, WHOLE_RUNS, derivative, launch, per_frame, results, watched
from support_processes import restarted, together

ROOT = Path(__file__).parent.parent
LOSS, GRADIENT = 1e-4, 2e-4
"""Relative difference of figures, and of a gradient to the largest entry of its tensor: sums in another order, in float32."""
ROUGH = 3e-2
"""The same where blocks compute in bfloat16."""
TAKEN_OVER = 1e-3
"""The same for weights, averages and optimiser states two steps after another number of processes took over."""

pytestmark = pytest.mark.usefixtures("single_thread")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        difference, size = float((found[name] - value).abs().max()), float(value.abs().max())
        assert difference <= tolerance * size + 1e-7, f"{what}, {name}: {difference:.3g} of {size:.3g}"


def assert_as_one(folder: Path, processes: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What several processes found is what this one finds."""
    method, spread, autocast, *_ = (*name.split("."), "off")
    monkeypatch.setitem(support_parallel.SPREADS, spread, replace(Parallel(), checkpointing=False))  # type: ignore[arg-type]
    one = watched(method, spread, autocast, folder=folder)
    monkeypatch.undo()
    loose = ROUGH if autocast == "bf16" else None
    found = [results(folder, name, rank) for rank in range(processes)]
    for row, expected in zip(found[0]["rows"], one["rows"], strict=True):
        assert row == pytest.approx(expected, rel=loose or LOSS, abs=1e-6), name
    assert_close(found[0]["gradients"], one["gradients"], loose or GRADIENT, name)
    assert_close(found[0]["weights"], one["weights"], loose or 1e-2, name)
    share = processes // support_parallel.SPREADS[spread].sequence
    for rank in found:  # every process calls the student as often: it draws the same grids and exits
        assert [calls * share for calls in rank["calls"]] == one["calls"], name
        assert rank["rows"] == found[0]["rows"], name


def assert_identical(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Figures, gradients and weights, bit for bit: the same sums in the same order."""
    assert found["rows"] == expected["rows"], what
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == expected[kind].keys() and found[kind], what
        for name, value in expected[kind].items():
            assert torch.equal(found[kind][name], value), f"{what}, {name}"


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_two_processes_compute_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "DMD2.shard", "AVDM2.shard", "Consistency.shard", "KnowledgeDistillation.shard", "DMD2-everything.sequence",
        "DMD2-scorers.shard", "Reconstruction.shard", "Consistency.shard.bf16", "KnowledgeDistillation.checkpointing",
        "KnowledgeDistillation.shard.off.aot_eager", "DMD2-adapters.whole", "KnowledgeDistillation-adapters.checkpointing",
    ]  # fmt: skip
    together(2, tmp_path, support_parallel.main, tmp_path, [*names, "per_frame", "streamed", "derivative"])
    for name in names:
        assert_as_one(tmp_path, 2, name, monkeypatch)
    for name, chunk in PER_FRAME.items():
        found = results(tmp_path, name)["found"]
        assert_close(found, per_frame("one", chunk), GRADIENT, f"a time per frame, shared tokens, {name}")
    found, one = results(tmp_path, "derivative")["found"], derivative("one")
    assert one["True derivative"].any() and any("blocks" in name for name in one)
    assert_close(found, one, GRADIENT, "derivatives of a sharded network")


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_four_processes_compute_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "DMD2.replicate",
        "DMD2-muon.replicate",
        "Consistency.sequence",
        "KnowledgeDistillation.shard",
        "KnowledgeDistillation-adapters.sequence",
    ]
    together(4, tmp_path, support_parallel.main, tmp_path, names)
    for name in names:
        assert_as_one(tmp_path, 4, name, monkeypatch)


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_frozen_blocks_can_be_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below adapters, and narrow ones beside sharded networks: the same numbers as whole ones, in half the memory."""
    pairs = {
        "DMD2-adapters.divided": "DMD2-adapters.whole",
        "DMD2-adapters.divided.narrow": "DMD2-adapters.whole.narrow",
        "DMD2-eight-bits-adapters.divided": "DMD2-eight-bits-adapters.whole",
        "DMD2.checkpointing.narrow": "DMD2.checkpointing.bf16",
    }
    alone = ["KnowledgeDistillation-adapters.divided.off.aot_eager"]
    together(2, tmp_path, support_parallel.main, tmp_path, [*pairs, *pairs.values(), *alone])
    assert_as_one(tmp_path, 2, "DMD2-adapters.divided", monkeypatch)
    assert_as_one(tmp_path, 2, alone[0], monkeypatch)
    for name, like in pairs.items():
        for rank in range(2):
            found, expected = results(tmp_path, name, rank), results(tmp_path, like, rank)
            assert_identical(found, expected, name)
            assert found["brought"] == 1 and expected["brought"] == 0
    whole, half = (results(tmp_path, name)["frozen"] for name in ("DMD2-adapters.whole", "DMD2-adapters.divided"))
    blocks = sum(p.nbytes for p in tiny_model().denoiser.backbone.blocks.parameters())
    assert whole - half == pytest.approx(blocks / 2, rel=0.1), "ends stay whole, of blocks there is a half"


@pytest.mark.slow
@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_four_processes_divide_frozen_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two groups, and together with tokens; `test_frozen_blocks_can_be_divided` has one group."""
    names = ["DMD2-adapters.divided_twice.narrow", "DMD2-adapters.divided_clips", "DMD2-adapters.divided_twice"]
    pairs = {names[0]: "DMD2-adapters.whole.narrow", names[1]: "DMD2-adapters.sequence"}
    together(4, tmp_path, support_parallel.main, tmp_path, [*names, *pairs.values()])
    for name, like in pairs.items():
        for rank in range(4):
            assert_identical(results(tmp_path, name, rank), results(tmp_path, like, rank), name)
    for name in names[1:]:
        assert_as_one(tmp_path, 4, name, monkeypatch)
    blocks = sum(p.nbytes for p in tiny_model().denoiser.backbone.blocks.parameters())
    whole = results(tmp_path, pairs[names[1]])["frozen"]
    held = [whole - results(tmp_path, name)["frozen"] for name in names[1:]]
    assert held == pytest.approx([blocks * 3 / 4, blocks / 2], rel=0.1), "neighbours that share clips have shares, too"


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_two_processes_train_a_transformed_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does; and one that imitates a frozen model of eight bits, of which each process has all."""
    names = [
        "DMD2-pruned.shard", "DMD2-steps.shard", "DMD2-eight-bits-adapters.shard", "Imitation.shard", "DMD2-head.shard",
        "DMD2-head.clips",
    ]  # fmt: skip
    together(2, tmp_path, support_parallel.main, tmp_path, [*names, "begun"])
    for name in names:
        assert_as_one(tmp_path, 2, name, monkeypatch)
    expected = fingerprint(tiny_model().transformed(Pruned(blocks=(1,))).denoiser)
    assert [results(tmp_path, "begun", rank)["print"] for rank in range(2)] == [expected] * 2
    assert support_parallel.begun(tmp_path)["print"] == expected


def test_fsdp_sees_inside_the_state_of_every_network() -> None:
    """What it does not know it takes for a constant: gradients would then be gathered too late, or not at all."""
    for module in pkgutil.walk_packages(adapters.__path__, f"{adapters.__name__}."):
        importlib.import_module(module.name)
    gc.unfreeze()  # conftest.py hides what was there before the tests
    every = [cls for cls in gc.get_objects() if issubclass(type(cls), type)]  # isinstance would wake lazy modules
    gc.freeze()
    kinds = [cls for cls in every if State in cls.__mro__[1:] and cls.__module__.startswith("fewstep.")]
    assert {"Begun", "Tokens", "Streams"} <= {cls.__name__ for cls in kinds}
    _let_fsdp_see_inside()
    x, cond = torch.zeros(1), torch.zeros(2)
    for cls in kinds:
        state = object.__new__(cls)
        vars(state).update({f.name: None for f in fields(cls)} | {fields(cls)[-1].name: x, fields(cls)[0].name: cond})
        assert [id(leaf) for leaf in tree_leaves(state) if leaf is not None] in (
            [id(cond), id(x)],
            [id(x), id(cond)],
        ), cls


@pytest.fixture
def place_to_run(tmp_path: Path) -> Path:
    """A folder with a teacher for `whole_run`."""
    tiny_model().save(tmp_path / "teacher")
    return tmp_path


def last_state(output: Path) -> RunState:
    return RunState.load(checkpoints(output / "checkpoints")[-1])


def assert_equal(found: RunState, expected: RunState) -> None:
    assert found.components.keys() == expected.components.keys()
    for name, tensors in expected.components.items():
        assert found.components[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found.components[name][key], tensor), f"{name}: {key}"


@pytest.mark.timeout(900)  # processes that share two cores with other tests
def test_a_killed_process_comes_back_and_nothing_is_lost(place_to_run: Path) -> None:
    """Two runs of two processes: one is killed and restarted by torchrun's agent, one is left in peace."""
    names = ["killed_run", "whole_run"]
    assert restarted(2, place_to_run, support_parallel.main, place_to_run, names, restarts=1) == ""
    killed, straight = place_to_run / "killed_run", place_to_run / "whole_run"
    assert (place_to_run / "was_killed").exists()
    assert_equal(last_state(killed), last_state(straight))
    for output in (killed, straight):
        assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == list(range(1, 5))
        names = {path.name for path in output.iterdir()}
        assert names >= {"recipe.yaml", "student", "checkpoints", "effective.json", "health.json"}
        assert "2 processes: replicate 1 x shard 2 x sequence 1" in (output / "effective.json").read_text()
        assert not list(output.rglob(".d*-*"))  # no litter
    records = [read_record(output) for output in (killed, straight)]
    assert records[0] == records[1] and records[1] is not None
    assert [check.vitals.step for check in records[1].checks] == [2, 4]
    students = [VideoModel.from_pretrained(output / "student").denoiser.state_dict() for output in (killed, straight)]
    assert all(torch.equal(students[0][name], value) for name, value in students[1].items())
    assert_one_takes_over(straight)


def assert_one_takes_over(output: Path) -> None:
    """One process goes on with what two have begun: an equal state, and the same end to rounding."""
    before, end = checkpoints(output / "checkpoints")
    theirs, saved = RunState.load(end), Checkpoint.open(before)
    settings = EXAMINED
    run = prepare(tiny_model(), CASES["DMD2"], Everything(), settings, output, provenance=saved.values["identity"])
    run.restore(saved)
    assert_equal(run.state(), RunState.load(before))
    while run.step < settings.steps:
        run.iterate()
    for name, tensors in theirs.components.items():
        assert_close(run.state().components[name], tensors, TAKEN_OVER, name)


@pytest.mark.timeout(900)  # processes that share two cores with other tests
@pytest.mark.parametrize(
    "name",
    [
        "whole_run",
        pytest.param("adapters_run", marks=pytest.mark.slow),
        "divided_run",
        pytest.param("pruned_run", marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_over_what_one_has_begun(place_to_run: Path, name: str) -> None:
    """Of the quick ones one trains whole networks, one adapters over blocks that are divided."""
    output = place_to_run / name
    WHOLE_RUNS[name](output)
    newest = checkpoints(output / "checkpoints")[-1]
    end, alone = RunState.load(newest), read_record(output)
    discard(newest)
    together(2, place_to_run, support_parallel.main, place_to_run, [name])
    for name, tensors in end.components.items():
        assert_close(last_state(output).components[name], tensors, TAKEN_OVER, name)
    both = read_record(output)
    assert alone is not None and both is not None and both.checks[0] == alone.checks[0]
    looks = [record.checks[-1].vitals.looks for record in (alone, both)]
    assert looks[1].distance == pytest.approx(looks[0].distance, rel=1e-2) and looks[1].accuracy == looks[0].accuracy


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(place_to_run: Path) -> None:
    done = launch(2, place_to_run, "raising_run")
    assert done.returncode != 0
    assert "this disk is gone" in done.stderr


# --- who does what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "sequence"), [(1, 1), (2, 1), (4, 2), (8, 2)])
def test_all_places_are_dealt_once(world: int, sequence: int) -> None:
    dealt = [list(Processes(rank, world, sequence=sequence).places(8)) for rank in range(world)]
    assert sorted(chain(*dealt[::sequence])) == list(range(8))
    assert all(dealt[rank] == dealt[rank - rank % sequence] for rank in range(world))  # neighbours share clips


def test_methods_draw_what_must_agree_without_a_word() -> None:
    places = [Rng(3, step=5, place=place) for place in range(4)]
    assert len({rng.integer("exit", 1000) for rng in places}) == 1
    for cls in METHODS:
        source = Path(str(__import__(cls.__module__, fromlist=["x"]).__file__)).read_text()
        assert not re.search(r"torch\.distributed|\bdist\.", source), cls


def test_a_hollow_copy_has_the_shape_and_not_the_memory() -> None:
    network = tiny_model().denoiser
    shell = hollow(network)
    assert all(p.is_meta for p in shell.parameters()) and not any(p.is_meta for p in network.parameters())
    shapes = lambda net: {name: p.shape for name, p in net.named_parameters()}  # noqa: E731
    assert shapes(shell) == shapes(network)
    shell.load_state_dict(network.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(shell.parameters(), network.parameters(), strict=True))


def test_checkpointing_changes_no_number_and_keeps_less(tmp_path: Path) -> None:
    kept = {}
    grads = {}
    for checkpointing in (False, True):
        settings = small(1, parallel=Parallel(checkpointing=checkpointing))
        run = prepare(tiny_model(), CASES["Consistency"], Everything(), settings, tmp_path)
        found: dict[str, Tensor] = {}
        support_parallel.watch_gradients(run, found)
        kept[checkpointing] = 0

        def count(tensor: Tensor, which: bool = checkpointing) -> Tensor:
            kept[which] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            run.iterate()
        grads[checkpointing] = found
    assert grads[True].keys() == grads[False].keys()
    assert all(torch.equal(grads[True][name], grad) for name, grad in grads[False].items())
    assert kept[True] < 0.8 * kept[False]


@pytest.mark.parametrize(("rank", "order"), [(0, ["open", "barrier"]), (1, ["barrier", "open"])])
def test_the_leader_opens_the_data_first(rank: int, order: list[str]) -> None:
    """What it stores (text states), the others read."""
    seen: list[str] = []

    class Waiting(Processes):
        def barrier(self) -> None:
            seen.append("barrier")

    class Noted(Everything):
        def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
            seen.append("open")
            return super().open(model, needs)

    open_data(Noted(), tiny_model(), CASES["DMD2"], Waiting(rank, 2))
    assert seen == order


def test_only_the_leader_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", resume_step=0, total=1, quiet=False, leads=False) as log:
        log.write(1, {"loss/a": 1.0})
        log.say("hello")
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


class Travels(nn.Linear):
    """Says where it is sent."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(1, 1)
        self.name, self.log, self.where = name, log, ""

    def to(self, where: str) -> Travels:  # type: ignore[override]
        if where != self.where:
            self.log.append(f"{self.name} to {where}")
        self.where = where
        return self


def test_networks_wait_on_the_cpu_until_an_update_asks_for_them() -> None:
    log: list[str] = []
    shelf = Shelf({role: Travels(role, log) for role in ("teacher", "student", "critic")}, "cuda")
    assert all(shelf.roles[role].where == "cpu" for role in shelf)

    def iteration() -> list[str]:
        log.clear()
        for _ in range(2):
            shelf.begin(("critic",))
            assert shelf.student.where == shelf.critic.where == "cuda"
        shelf.begin(("student",))
        assert shelf["student"].where == shelf.teacher.where == shelf.critic.where == "cuda"
        return list(log)

    assert iteration() == ["student to cuda", "critic to cuda", "teacher to cuda"]
    assert iteration() == ["teacher to cpu", "teacher to cuda"]  # no network that the next update needs ever leaves
    with pytest.raises(AttributeError, match="no role 'critc'; it has teacher, student, critic"):
        _ = shelf.critc
    log.clear()
    shelf.bring("teacher", "student")  # for a picture
    assert log == ["critic to cpu"] and shelf.roles["teacher"].where == shelf.roles["student"].where == "cuda"
    views = Views(shelf)
    views.begin(("critic",))
    assert views.critic.where == "cuda" and shelf.roles["teacher"].where == "cpu"  # a view brings nobody in


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_changes_no_number(tmp_path: Path) -> None:
    ends = []
    for offload in (False, True):
        settings = small(4, device="cuda", ema=0.9, parallel=Parallel(offload=offload))
        run = prepare(tiny_model(), CASES["DMD2"], Everything(), settings, tmp_path)
        for _ in range(4):
            run.student()
            run.iterate()
            places = {tensor.device.type for tensor in run.average.state_dict().values()}  # type: ignore[union-attr]
            assert places == {"cpu" if offload else "cuda"}
        ends.append({key: value.cpu() for key, value in run.student().denoiser.state_dict().items()})
        if offload:
            assert {t.device.type for o in run.optimizers.values() for t in o.state().values()} == {"cpu"}
    assert_close(ends[0], ends[1], 1e-6, "offload")


# --- what cannot be had -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "parallel", "accumulate", "message"),
    [
        (1, Parallel(shard=4), 4, r"needs 4 processes, and this run has 1; start it with torchrun --nproc-per-node 4"),
        (6, Parallel(sequence=4), 4, r"needs a multiple of 4 processes, and this run has 6"),
        (8, Parallel(replicate=2, shard=2), 8, r"replicate 2 x shard 2 x sequence 1 needs 4 processes"),
        (8, Parallel(), 4, r"4 micro-batches per step cannot be divided evenly among 8 processes; write accumulate: 8"),
        (8, Parallel(sequence=2), 6, r"write accumulate: 8"),
        (1, Parallel(offload=True), 1, r"settings.parallel.offload moves idle networks to the CPU, and .* already cpu"),
    ],
)
def test_processes_that_cannot_do_it_are_refused(
    world: int, parallel: Parallel, accumulate: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        require_mesh(parallel, accumulate, "cpu")


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        (
            CASES["Consistency"],
            {"compile": True, "parallel": Parallel(sequence=2)},
            "compile cannot compile the communication between processes",
        ),
        (CASES["Reconstruction"], {"parallel": Parallel(sequence=2)}, "settings.parallel.sequence is for denoisers"),
        (CASES["Reconstruction"], {"parallel": Parallel(shard=2)}, "shard is for denoisers, and Reconstruction trains"),
        (CASES["Reconstruction"], {"parallel": Parallel(checkpointing=True)}, "checkpointing is for denoisers"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    method: Method, others: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        train(tiny_model(), method, Everything(), small(2, accumulate=2, **others), tmp_path, quiet=True)


def test_a_network_that_cannot_share_its_tokens_says_so() -> None:
    class Alone(VideoDiT):
        shares = False

    network = Alone(channels=4, width=24, depth=1, heads=2, text_width=16)
    Spread(checkpointing=True).check(network)
    shared = Spread(shared=object())  # type: ignore[arg-type]
    x, cond = torch.zeros(1, 4, 2, 4, 4), Cond(torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
    for refused in (lambda: shared.check(network), lambda: network(x, torch.ones(1), cond, shared(Call()))):
        with pytest.raises(ValueError, match="cannot share the tokens of a Alone; set parallel.sequence: 1"):
            refused()


@pytest.mark.parametrize("field", ["shard", "replicate", "sequence"])
def test_sizes_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"settings.parallel.{field} must be at least"):
        Parallel(**{field: -1})


def test_a_run_may_go_on_with_another_spread(tmp_path: Path) -> None:
    settings = small(2)
    train(tiny_model(), CASES["Consistency"], Everything(), settings, tmp_path, quiet=True)
    other = replace(settings, parallel=Parallel(checkpointing=True))
    assert isinstance(train(tiny_model(), CASES["Consistency"], Everything(), other, tmp_path, quiet=True), VideoModel)
