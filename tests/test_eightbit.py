"""AdamW with moments of 8 bits: its moments are AdamW's up to a block's resolution, runs resume, plans know its size."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from fewstep import Recipe
from fewstep.cli.plan import how
from fewstep.data import Prompts
from fewstep.engine import Optim, Parallel, memory, train
from fewstep.engine.checkpoint import RunState, checkpoints
from fewstep.engine.memory import Holding, Means, Phase, Plan, eight_bit_bytes, remedies
from fewstep.engine.optim import RoleOptimizer, state_bytes
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible, require_processes
from fewstep.engine.space import checkpoint_bytes
from fewstep.methods import Method
from fewstep.models import Lora, VideoModel
from fewstep.models.fingerprint import fingerprint
from fewstep.models.source import Pretrained
from support_engine import CASES, FRAMES, Everything, small, stored_card, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
EIGHT = Optim(type="adamw8bit", lr=1e-3)
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, of the extras test and eightbit"
)


def layer(seed: int = 0) -> nn.Linear:
    """8192 weights, of which 8-bit moments are kept, and 64 biases, whose moments stay float32."""
    torch.manual_seed(seed)
    return nn.Linear(128, 64)


def gradients(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Different in size from row to row, as those of a network."""
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-3, 0, 64)[:, None]
    for _ in range(steps):
        yield size * torch.randn(64, 128, generator=generator), torch.randn(64, generator=generator)


def stepped(network: nn.Linear, optimizer: RoleOptimizer, steps: int) -> nn.Linear:
    for step, (weight, bias) in enumerate(gradients(steps)):
        network.weight.grad, network.bias.grad = weight.clone(), bias.clone()
        optimizer.step(step)
    return network


def moment(state: dict[str, Tensor], which: int, optimizer: RoleOptimizer) -> Tensor:
    """A moment of the weights in numbers: a value of the map for each code, times the scale of its block of 256."""
    codes, scales = state[f"adamw8bit/state{which}/weight"], state[f"adamw8bit/absmax{which}/weight"]
    values = optimizer.parts["adamw8bit"].name2qmap["dynamic" if which == 1 else "udynamic"]  # type: ignore[attr-defined]
    return (values[codes.int()].view(-1, 256) * scales[:, None]).view(codes.shape).double()


# --- the optimiser ----------------------------------------------------------------------------------------------------


@needs_library
def test_its_moments_are_adamws_up_to_the_resolution_of_a_block() -> None:
    """In float64: m = b1 m + (1 - b1) g and v = b2 v + (1 - b2) g^2, from step to step with what 8 bits kept."""
    optim, network = replace(EIGHT, betas=(0.8, 0.9)), layer()
    optimizer = RoleOptimizer(network, optim, 10)
    m = v = torch.zeros(64, 128, dtype=torch.float64)
    for step, (weight, bias) in enumerate(gradients(4)):
        network.weight.grad, network.bias.grad = weight.clone(), bias.clone()
        before = network.weight.detach().double()
        optimizer.step(step)
        m, v = 0.8 * m + 0.2 * weight.double(), 0.9 * v + 0.1 * weight.double() ** 2
        update = m / (1 - 0.8 ** (step + 1)) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        torch.testing.assert_close(network.weight.detach().double(), before - 1e-3 * update, rtol=0, atol=2e-7)
        state = optimizer.state()
        for which, exact in ((1, m), (2, v)):
            kept, largest = moment(state, which, optimizer), exact.abs().view(-1, 256).amax(1)
            torch.testing.assert_close(state[f"adamw8bit/absmax{which}/weight"].double(), largest, rtol=1e-5, atol=0)
            error = (kept - exact).abs().view(-1, 256) / largest[:, None]
            assert 1e-4 < float(error.max()) < 0.01, "half of the widest gap between two of 256 values"
        m, v = moment(state, 1, optimizer), moment(state, 2, optimizer)


@needs_library
def test_small_tensors_are_trained_as_by_adamw() -> None:
    ours, theirs = layer(), layer()
    optim = Optim(lr=1e-2, betas=(0.7, 0.95), weight_decay=0.3, lr_of={"bias": 2e-2})
    stepped(ours, RoleOptimizer(ours, replace(optim, type="adamw8bit"), 10), 5)
    stepped(theirs, RoleOptimizer(theirs, optim, 10), 5)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=1e-6)
    far = float((ours.weight - theirs.weight).detach().abs().max())
    assert 1e-6 < far < 2e-2, "the weights have moved alike, not by the same bits"


@needs_library
def test_states_are_plain_tensors_of_the_size_that_is_planned() -> None:
    network = layer()
    optimizer = RoleOptimizer(network, EIGHT, 10)
    stepped(network, optimizer, 2)
    state = optimizer.state()
    kinds = {key: (tuple(t.shape), t.dtype) for key, t in state.items()}
    eight = {"state": ((64, 128), torch.uint8), "absmax": ((32,), torch.float32)}
    assert kinds == {
        **{f"adamw8bit/{slot}{which}/weight": kind for slot, kind in eight.items() for which in (1, 2)},
        **{f"adamw8bit/state{which}/bias": ((64,), torch.float32) for which in (1, 2)},
        **{f"adamw8bit/step/{name}": ((), torch.float32) for name in ("weight", "bias")},
    }
    assert state["adamw8bit/step/bias"].item() == 2
    moments = sum(t.nbytes for key, t in state.items() if "/step/" not in key)
    assert moments == state_bytes(network, EIGHT) == 2 * (8192 + 4 * 32) + 8 * 64


@needs_library
def test_it_goes_on_from_stored_states_bit_for_bit() -> None:
    whole, parts = layer(), layer()
    stepped(whole, RoleOptimizer(whole, EIGHT, 10), 6)
    first = RoleOptimizer(parts, EIGHT, 10)
    every = list(gradients(6))
    for step, (weight, bias) in enumerate(every):
        if step == 3:
            kept = {key: tensor.clone() for key, tensor in first.state().items()}
            first = RoleOptimizer(parts, EIGHT, 10)
            for key, tensor in first.allocate(kept).items():
                tensor.copy_(kept[key])
        parts.weight.grad, parts.bias.grad = weight.clone(), bias.clone()
        first.step(step)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)


@needs_library
def test_moments_that_wait_come_back_to_their_weights() -> None:
    network, waiting = layer(), layer()
    stepped(network, RoleOptimizer(network, EIGHT, 10), 3)
    optimizer = RoleOptimizer(waiting, EIGHT, 10, rest=True)
    stepped(waiting, optimizer, 3)
    assert torch.equal(network.weight, waiting.weight)
    assert {tensor.device.type for tensor in optimizer.state().values()} == {"cpu"}


@needs_library
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pages_hold_the_same_moments_on_a_gpu() -> None:
    """Tensors below 1e5 values are not paged by the library; this one is, and goes on from a stored state."""
    found = []
    for kind in ("adamw8bit", "paged_adamw8bit"):
        torch.manual_seed(0)
        network = nn.Linear(512, 512, device="cuda")
        optim = replace(EIGHT, type=kind)  # type: ignore[arg-type]
        optimizer = RoleOptimizer(network, optim, 10)
        for step in range(4):
            if step == 2:
                kept = {key: tensor.detach().cpu().clone() for key, tensor in optimizer.state().items()}
                optimizer = RoleOptimizer(network, optim, 10)
                for key, tensor in optimizer.allocate(kept).items():
                    tensor.copy_(kept[key])
            generator = torch.Generator("cuda").manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
            optimizer.step(step)
        found.append(network.weight.detach().clone())
        paged = optimizer.state()[f"{kind}/state1/weight"]
        assert getattr(paged, "is_paged", False) is kind.startswith("paged")
    assert torch.equal(*found)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_counts_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 256 values have 8-bit moments, so that tiny networks have some."""
    monkeypatch.setattr(memory, "SMALL", 256)
    monkeypatch.setattr("fewstep.engine.eightbit.SMALL", 256)


@needs_library
@pytest.mark.parametrize("lora", [None, Lora(rank=16)], ids=["whole", "adapters"])
@pytest.mark.usefixtures("tiny_counts_as_large")
def test_a_run_resumes_bit_for_bit_and_writes_what_is_planned(lora: Lora | None, tmp_path: Path) -> None:
    settings = small(4, save_every=2, optim={"student": EIGHT}, lora=lora, health=None)
    model, data = tiny_model(), Everything()
    whole = train(model, CASES["DMD2"], data, settings, tmp_path / "whole", quiet=True)
    run = prepare(tiny_model(), CASES["DMD2"], data, settings, tmp_path / "half")
    run.iterate()
    run.iterate()
    run.state().save(tmp_path / "half" / "checkpoints")
    resumed = train(tiny_model(), CASES["DMD2"], data, settings, tmp_path / "half", quiet=True)
    assert fingerprint(resumed.denoiser) == fingerprint(whole.denoiser) != fingerprint(tiny_model().denoiser)
    ours, theirs = (RunState.load(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("half", "whole"))
    assert ours.step == theirs.step == 4
    for name, tensors in theirs.components.items():
        assert tensors and all(torch.equal(tensor, ours.components[name][key]) for key, tensor in tensors.items())
    every = [tensor for tensors in theirs.components.values() for tensor in tensors.values()]
    assert {tensor.dtype for tensor in every} == {torch.float32, torch.uint8}
    assert checkpoint_bytes(run) == sum(tensor.nbytes for tensor in every if tensor.dim())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_the_library_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    recipe = Recipe(
        model=Pretrained(source="world"), method=CASES["DMD2"], data=Prompts(path=str(tmp_path / "p.txt")),
        settings=small(9, optim={"student": Optim(), "critic": EIGHT}),
    )  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found(name, *a) if name != "bitsandbytes" else None
    )
    monkeypatch.setattr(Pretrained, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    recipe.check()  # a plan for another machine
    with pytest.raises(
        ValueError, match=r'optim.critic: adamw8bit needs bitsandbytes.*pip install "fewstep\[eightbit\]"'
    ):
        recipe.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


PAGED = {"student": Optim(type="paged_adamw8bit")}


@pytest.mark.parametrize(
    ("method", "others", "message"),
    [
        ("DMD2", {"optim": PAGED}, "this device has no other memory; write adamw8bit"),
        ("DMD2", {"optim": PAGED, "device": "cuda", "parallel": Parallel(offload=True)}, "offload moves them already"),
        ("DMD2", {"optim": {"critic": EIGHT}, "parallel": Parallel(shard=2)}, "optim.critic: .* blocks of whole weights"),
        ("DMD2", {"optim": {"student": EIGHT}, "parallel": Parallel(sequence=2)}, "or train adapters"),
        ("DMD2", {"optim": {"student": EIGHT}, "parallel": Parallel(replicate=2)}, "write type: adamw"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(method: str, others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_possible(CASES[method], small(20, **others), tiny_model().card, None)


def test_what_can_be_is_not_refused() -> None:
    card = stored_card(tiny_model())
    for others in (
        {"optim": PAGED, "device": "cuda"},
        {"optim": {"student": EIGHT}, "device": "cuda", "parallel": Parallel(offload=True)},
        {"optim": {"student": EIGHT}, "parallel": Parallel(shard=2, checkpointing=True), "lora": Lora(rank=2)},
    ):
        require_possible(CASES["DMD2"], small(20, **others), card, None)
    require_processes(small(20, optim={"student": Optim()}))


def test_divided_weights_are_refused(tmp_path: Path) -> None:
    """Also where only the number of processes, which a recipe does not name, divides them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, network = init_device_mesh("cpu", (1,)), layer()
        for name, parameter in list(network.named_parameters()):
            setattr(network, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
        with pytest.raises(ValueError, match="processes divide the weights of this network; write type: adamw"):
            RoleOptimizer(network, EIGHT, 10)
    finally:
        dist.destroy_process_group()


# --- plans ------------------------------------------------------------------------------------------------------------


def planned(method: Method, model: VideoModel, **others: Any) -> Plan:
    card = stored_card(model)
    return Outline.of(card, method, small(20, health=None, **others), FRAMES).plan()


def test_a_plan_knows_8_bit_states_and_what_they_would_save() -> None:
    method, model = CASES["FlowMatching"], tiny_model(depth=1)
    sizes = [p.numel() for p in model.denoiser.parameters()]
    float32 = planned(method, model, optim={"student": Optim()})
    eight = planned(method, model, optim={"student": EIGHT})
    (own,), (less,) = ([h for h in plan.holdings if h.role == "student"] for plan in (float32, eight))
    assert own.optimizer == 8 * sum(sizes) and less.optimizer == eight_bit_bytes(sizes) and less.slack == 0
    assert own.slack == own.optimizer - less.optimizer
    assert planned(method, model, optim={"student": Optim(type="muon")}).holdings[-1].slack == 0
    assert float32.by(Means(eight_bit=True)).peak.bytes == eight.peak.bytes
    assert state_bytes(model.denoiser, Optim(type="paged_adamw8bit")) == less.optimizer


HELD = Holding(role="student", network="Net", parameters=100, trained=100, weights=400, optimizer=800, slack=600)
TRAINING = Phase(
    reads=frozenset({"student"}), gradients={"student": 400}, activations=10, copies=frozenset({"student"})
)


def test_8_bit_states_are_offered_where_weights_stay_whole() -> None:
    plan = Plan(holdings=(HELD,), phases=(TRAINING,), flops=1)
    found = {remedy.names: remedy.bytes for remedy in remedies({(): plan}, 4, elsewhere=False)}
    whole = 400 + 800 + 400 + 10 + 1200
    assert found == {(): whole, ("8-bit optimiser states",): whole - 2 * 600}
    assert "adamw8bit" in how("8-bit optimiser states", 4)
    away = plan.by(Means(offload=True, eight_bit=True))
    assert away.total(TRAINING) == 400 + 400 + max(10 + 600, 200)
    cut = replace(plan, holdings=(replace(HELD, gathered=80),))
    names = {remedy.names for remedy in remedies({(): cut}, 4, elsewhere=False)}
    assert names == {(), ("8-bit optimiser states",), ("sharding over 4",)}
    none = replace(plan, holdings=(replace(HELD, slack=0),))
    assert {remedy.names for remedy in remedies({(): none}, 4, elsewhere=False)} == {()}
