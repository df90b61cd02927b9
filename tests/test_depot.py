"""Frozen blocks that come when they run: the right ones, with the same numbers, and no longer than needed."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.compress import Int8, Pruned, StepScales, Transform
from fewstep.core import Call, Rng
from fewstep.engine import Health, Parallel, Settings
from fewstep.engine import prepare as preparing
from fewstep.engine.health import weights
from fewstep.engine.offload import Shelf
from fewstep.engine.prepare import prepare, require_possible, require_processes
from fewstep.engine.preview import Preview
from fewstep.engine.probe import WorldProbe
from fewstep.engine.run import Run
from fewstep.engine.settings import Optim
from fewstep.engine.shard import divided, gathered
from fewstep.engine.student import untrained
from fewstep.methods import DMD2
from fewstep.models import Lora, VideoModel, fingerprint
from fewstep.models.bundle import read_card
from fewstep.models.depot import Depot, deposit, depot_of
from fewstep.models.lora import adapt, duplicate, load_adapter, merge, weaken
from fewstep.models.spread import Spread, to_cpu
from support_engine import CASES, Everything, small, tiny_model
from support_parallel import METHODS, brought_blocks
from test_lora import call, moved

pytestmark = pytest.mark.usefixtures("single_thread")
LORA, CPU = Lora(rank=2), torch.device("cpu")
WAITING = Parallel(offload=True, checkpointing=True)
DENOISERS = [name for name, method in CASES.items() if method.part == "denoiser" and not method.transforms]
"""Those whose student reads more than its teacher are not trained by adapters."""


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks wait on the CPU for a run on the CPU: what comes is a copy there, too."""
    monkeypatch.setattr(preparing, "require_mesh", lambda *_: None)


def put(network: Any) -> Depot:
    """Put the blocks of a denoiser into a depot, from which copies come."""
    depot = Depot(CPU, waits=True)
    deposit(network, {name: tensor.clone() for name, tensor in network.state_dict().items()}, depot)
    return depot


def settings_of(steps: int, **others: Any) -> Settings:
    return small(
        steps, **({"lora": LORA, "ema": 0.5, "parallel": WAITING, "optim": {"student": Optim(lr=1e-2)}} | others)
    )


def pair(folder: Path, method: str, **others: Any) -> tuple[Run, Run]:
    """A run whose frozen blocks wait, and one that holds them."""
    made = []
    for offload in (True, False):
        settings = settings_of(8, **others, parallel=replace(WAITING, offload=offload))
        made.append(
            prepare(tiny_model(depth=3), (CASES | METHODS)[method], Everything(), settings, folder / str(offload))
        )  # type: ignore[operator]
    return made[0], made[1]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_block_gets_its_own_weights_in_every_network() -> None:
    """The teacher, adapters over it, a weaker view and an average: each finds what it borrowed under its own names."""
    plain = tiny_model(depth=3).denoiser.requires_grad_(False)
    network = copy.deepcopy(plain)
    depot = put(network)
    student, before = adapt(network, LORA, Rng(0)), adapt(plain, LORA, Rng(0))
    for mine, like in (
        (network, plain), (student, before), (weaken(student, 0.5), weaken(before, 0.5)), (duplicate(student), before),
    ):  # fmt: skip
        assert depot_of(mine) is depot and not any(adapter.is_meta for adapter in student.parameters())
        for block, its in zip(mine.backbone.blocks, like.backbone.blocks, strict=True):
            tensors = {**dict(its.named_parameters()), **dict(its.named_buffers())}
            brought = depot.bring(block)
            assert brought.keys() == {name for name in tensors if ".lora_" not in name}
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in brought.items())
            assert all(tensor.is_meta for name, tensor in block.named_buffers() if name in brought)
    assert torch.equal(call(network), call(plain)) and torch.equal(call(moved(student)), call(moved(before)))


def test_two_networks_may_wait_in_one_depot() -> None:
    """A student whose own base differs from the teacher is never given the teacher's weights."""
    one, other = tiny_model().denoiser, tiny_model(seed=3).denoiser
    expected = call(one), call(other), call(moved(adapt(other, LORA, Rng(0))))
    depot = put(one)
    deposit(other, copy.deepcopy(other.state_dict()), depot)
    assert torch.equal(call(one), expected[0]) and torch.equal(call(other), expected[1])
    assert torch.equal(call(moved(adapt(other, LORA, Rng(0)))), expected[2])


def test_types_tied_weights_and_repeated_blocks_stay_as_they_are() -> None:
    """In one piece of memory per block, whatever is in it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False).bfloat16(), nn.Linear(3, 3)
            self.second.tied = self.second.bias
            self.register_buffer("whole", torch.arange(5, dtype=torch.int8))
            self.register_buffer("one", torch.tensor(2.0, dtype=torch.float64))
            self.register_buffer("table", torch.ones(2), persistent=False)

    block = Block()
    kept, depot = copy.deepcopy(block.state_dict()), Depot(CPU)
    depot.put(block, kept)
    depot.put(block, {name: 0 * tensor for name, tensor in kept.items()})  # it is there already
    found = depot.bring(block)
    assert found.keys() == {"first.weight", "second.weight", "second.bias", "whole", "one"}
    assert all(torch.equal(found[name], kept[name]) and found[name].dtype == kept[name].dtype for name in found)
    assert block.second.tied is block.second.bias and not block.table.is_meta
    assert 0 < depot.held < 6 * 256 and len({t.untyped_storage().data_ptr() for t in found.values()}) == 1


def test_a_block_goes_when_it_is_done_and_comes_again_in_the_backward_pass() -> None:
    plain = tiny_model(depth=4).denoiser.requires_grad_(False)
    network = copy.deepcopy(plain)
    put(network)
    student, before = moved(adapt(network, LORA, Rng(0))), moved(adapt(plain, LORA, Rng(0)))
    again = Spread(checkpointing=True)
    with brought_blocks() as brought:
        out = call(student, again(Call()))
        assert (brought.here, brought.most, brought.count) == (0, 1, 4)
        call(network)  # another role in between
        assert (brought.here, brought.most, brought.count) == (0, 1, 8)
        out.square().sum().backward()
        assert (brought.here, brought.most, brought.count) == (0, 1, 12)
    call(before).square().sum().backward()
    for mine, its in zip(student.parameters(), before.parameters(), strict=True):
        assert its.grad is not None and torch.equal(mine.grad, its.grad)
    with brought_blocks() as brought:
        kept = call(student)  # nobody computes the blocks again, so the graph keeps them all
        assert brought.here == 4 and kept.requires_grad


def test_shares_of_all_processes_are_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ones, in the order of ranks; nobody keeps more than its own."""
    plain, depots, ranks = tiny_model().denoiser, list[Depot](), list[Any]()
    for rank in range(3):
        monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        ranks.append(copy.deepcopy(plain))
        depots.append(Depot(CPU, group=object()))  # type: ignore[arg-type]
        deposit(ranks[-1], plain.state_dict(), depots[-1])
    kept = [next(iter(depot._slots.values())).share for depot in depots]
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda whole, share, group: whole.copy_(torch.cat(kept)))
    found, expected = depots[1].bring(ranks[1].backbone.blocks[0]), dict(plain.backbone.blocks[0].named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len({len(share) for share in kept}) == 1 and kept[0].untyped_storage().nbytes() == len(kept[0])
    size = sum(p.nbytes for p in plain.backbone.blocks.parameters())
    assert size / 3 <= depots[0].held < 1.2 * size / 3


def test_what_flows_between_blocks_waits_elsewhere() -> None:
    """Of what blocks read, nothing is held between the forward and the backward pass but its copies; gradients are the same."""
    network, flows = tiny_model(depth=4).denoiser, list[weakref.ref[Any]]()

    def noting(block: Any, state: Any, place: Any) -> Any:
        flows.append(weakref.ref(state.streams[0].untyped_storage()))
        return block(state)

    grads, held = [], []
    for park in (None, to_cpu):
        network.zero_grad(set_to_none=True)
        out = call(network, Spread(checkpointing=True, park=park)(Call(runner=noting)))
        held.append(sum(flow() is not None for flow in flows[-4:]))
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    assert held == [4, 0]
    assert all(torch.equal(mine, its) for mine, its in zip(*grads, strict=True)) and any(g.any() for g in grads[0])


def test_networks_whose_blocks_wait_do_not_move() -> None:
    """Beside networks that come and go as a whole."""
    teacher, student = tiny_model().denoiser, tiny_model().denoiser
    put(teacher)
    shelf = Shelf({"teacher": teacher, "student": student}, "cpu", stay=["teacher"])
    shelf.bring("student")
    assert shelf["teacher"] is teacher and divided(teacher) and torch.equal(call(teacher), call(student))


def test_who_reads_a_weight_outside_of_its_block_gets_an_error() -> None:
    network = tiny_model().denoiser
    put(network)
    student = adapt(network, LORA, Rng(0))
    assert divided(network) and not divided(student)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        network.backbone.blocks[0].mlp.up(torch.zeros(1, network.backbone.width))
    with pytest.raises(ValueError, match="a copy of a network has other tensors"):
        call(merge(network, moved(student)))


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("method", [*DENOISERS, "DMD2-adapters"])
def test_every_method_trains_the_same_adapters(method: str, tmp_path: Path) -> None:
    waits, holds = pair(tmp_path, method)
    for _ in range(2):
        with brought_blocks() as brought:
            waits.iterate()
        holds.iterate()
        assert (brought.here, brought.most) == (0, 1)
    assert waits.figures == holds.figures
    for name, network in holds.changing.items():
        assert same(waits.changing[name].state_dict(), network.state_dict()), name


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    ("transforms", "frozen"),
    [
        ((), "float32"),
        pytest.param((), "bf16", marks=pytest.mark.slow),  # the pruned one has narrow matrices, too
        ((Int8(),), "float32"),
        ((Pruned(blocks=(1,)),), "bf16"),
    ],
)
def test_what_a_run_shows_and_keeps_is_the_same(transforms: tuple[Transform, ...], frozen: str, tmp_path: Path) -> None:
    """Clips, checks, pictures, and the student's folder, whose adapters are merged into the exact weights."""
    others = {"autocast": "bf16" if frozen == "bf16" else "off", "frozen": frozen, "transforms": transforms}
    found = []
    for run in pair(tmp_path, "DMD2", **others, preview_every=2, health=Health(every=2, prompts=1)):
        run.iterate()
        run.iterate()
        run.keep(run.output / "kept")
        run.keep(run.output / "kept")  # what was merged once is not merged again
        assert run.monitor is not None and isinstance(run.preview, Preview)
        vitals = run.monitor.check(run.student(), run.step).vitals
        with run.monitor.gauge.precision():
            clips = run.student().latents(["a red ball"])
        assert run.preview.draw(run.student()).size == (1164, 404)
        scores = WorldProbe(prompts=1)(run.student())
        kept = VideoModel.from_pretrained(run.output / "kept").denoiser
        found.append((fingerprint(kept), vitals.moved, run.figures, clips, vitals.looks.distance, scores.keys()))
    waits, holds = found
    assert waits[:3] == holds[:3] and waits[5] == holds[5]
    close = (
        {"rel": 0.1} if frozen == "bf16" else {"rel": 1e-3}
    )  # one multiplies by B A, the other adds it to the weights
    assert float(waits[3].std()) == pytest.approx(float(holds[3].std()), **close)
    assert float((waits[3] - holds[3]).norm() / holds[3].norm()) < (0.05 if frozen == "bf16" else 1e-4)


@pytest.mark.usefixtures("copies")
def test_the_model_of_the_caller_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    before = fingerprint(model.denoiser)
    run = prepare(model, DMD2(critic_updates=1), Everything(), settings_of(2), tmp_path)
    run.iterate()
    run.keep(tmp_path / "kept")
    assert fingerprint(model.denoiser) == before != fingerprint(VideoModel.from_pretrained(tmp_path / "kept").denoiser)
    again = load_adapter(tiny_model().denoiser, tmp_path / "kept" / "adapter")
    assert fingerprint(merge(tiny_model().denoiser, again)) == fingerprint(
        VideoModel.from_pretrained(tmp_path / "kept").denoiser
    )
    assert {t.device.type for o in run.optimizers.values() for t in o.state().values()} == {"cpu"}
    assert "frozen blocks on the CPU" in run.effective.spread and run.spread.park is to_cpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_blocks_change_no_number_on_a_gpu(tmp_path: Path) -> None:
    ends = []
    for offload in (False, True):
        parallel = Parallel(offload=offload, checkpointing=True)
        settings = settings_of(4, device="cuda", autocast="bf16", frozen="bf16", parallel=parallel)
        run = prepare(tiny_model(depth=3), DMD2(critic_updates=1), Everything(), settings, tmp_path / str(offload))
        for _ in range(4):
            run.iterate()
        run.keep(run.output / "kept")
        ends.append({name: tensor.cpu() for name, tensor in run.nets.roles["student"].state_dict().items()})
        if offload:
            depot = depot_of(run.nets.roles["student"])
            assert depot is not None and all(slot.share.is_pinned() for slot in depot._slots.values())
    assert same(*ends)


def test_narrow_frozen_blocks_are_put_away_in_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes; and a network that another one starts from is read from its file, tensor by tensor."""
    monkeypatch.setattr(preparing, "require_mesh", lambda *_: None)
    teacher, held = tiny_model().save(tmp_path / "teacher"), {}
    for frozen in ("float32", "bf16"):
        model = VideoModel.from_pretrained(teacher, leave=("denoiser",))
        settings = settings_of(2, autocast="bf16", frozen=frozen)
        run = prepare(model, DMD2(critic_updates=1), Everything(), settings, tmp_path / frozen)
        run.iterate()
        depot = depot_of(run.nets.roles["teacher"])
        assert depot is not None and depot_of(run.nets.roles["critic"]) is depot
        held[frozen] = depot.held
        whole = gathered(run.nets.roles["teacher"])
        for name, value in tiny_model().denoiser.state_dict().items():
            assert torch.equal(whole[name].float(), value if whole[name].dtype == torch.float32 else value.bfloat16())
    assert held["bf16"] < 0.65 * held["float32"]


def test_weights_are_looked_at_where_they_are_with_what_adapters_add() -> None:
    plain = tiny_model().denoiser.requires_grad_(False)
    network = copy.deepcopy(plain)
    put(network)
    mine, its = moved(adapt(network, LORA, Rng(0))), moved(adapt(plain, LORA, Rng(0)))
    assert torch.equal(weights.sample(mine), weights.sample(its))


def test_clips_are_made_by_a_network_whose_blocks_come() -> None:
    for transforms in ((), (StepScales(steps=2),)):
        model = tiny_model().transformed(*transforms)
        before = model.latents(["a red ball"], num_inference_steps=2, force=True)
        put(model.denoiser)
        assert torch.equal(model.latents(["a red ball"], num_inference_steps=2, force=True), before)
        assert model.device == CPU


def test_the_untrained_student_is_made_of_a_whole_teacher() -> None:
    model, settings = tiny_model(depth=3), settings_of(2, transforms=(Pruned(blocks=(1,)),))
    expected = fingerprint(model.transformed(Pruned(blocks=(1,))).denoiser)
    put(model.denoiser)
    assert fingerprint(untrained(model, settings, None).denoiser) == expected


@pytest.mark.parametrize(
    "others",
    [
        {"lora": LORA, "parallel": Parallel(shard=2)},
        {"lora": LORA, "parallel": Parallel(replicate=2)},
        {"lora": LORA, "parallel": Parallel(offload=True)},
        {"autocast": "bf16", "frozen": "bf16", "parallel": Parallel(shard=2)},
    ],
)
def test_blocks_that_come_must_come_again(others: dict[str, Any]) -> None:
    settings = small(2, **others)
    with pytest.raises(ValueError, match=r"come when they run.*write checkpointing: true"):
        require_possible(DMD2(), settings, read_card("world"), None)
    again = replace(settings, parallel=replace(settings.parallel, checkpointing=True))
    require_possible(DMD2(), again, read_card("world"), None)
    assert again.brings() and not replace(again, parallel=Parallel()).brings()
    neighbours = Parallel(shard=1, sequence=2)
    assert not neighbours.whole and Parallel(shard=1).whole and Parallel(sequence=2).whole


def test_narrow_networks_are_sharded_where_there_are_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(2, accumulate=2, autocast="bf16", frozen="bf16")
    require_processes(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="write checkpointing: true"):
        require_processes(settings)
    require_processes(replace(settings, lora=LORA))  # every process has the frozen weights whole
