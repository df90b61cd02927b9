"""Adapters: equal to the teacher at zero, one frozen set of weights, checkpoints of adapters only, peft's files."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.compress import Branches, Int8
from fewstep.compress.linear import linears
from fewstep.core import Batch, Call, Cond, Rng
from fewstep.core.compiling import compile_problem
from fewstep.diffusion import CFG, Prediction
from fewstep.engine import Optim, Parallel, Settings, train
from fewstep.engine.nets import build_nets
from fewstep.engine.prepare import prepare
from fewstep.methods import DMD2, Consistency, Nets, Progressive, Reconstruction, ReverseKL, Scorers
from fewstep.models import Denoiser, Lora, VideoModel, fingerprint
from fewstep.models.averaging import blend
from fewstep.models.lora import (
    LoraLinear,
    Merged,
    adapt,
    adapters,
    duplicate,
    load_adapter,
    merge,
    save_adapter,
    weaken,
)
from fewstep.models.spread import Spread
from fewstep.models.stored import write_tensors
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import ONE_STEP, RF, FreeClips, cond_of

pytestmark = pytest.mark.usefixtures("single_thread")
LORA = Lora(rank=4, alpha=8.0)
DMD = DMD2(critic_updates=1, scorers=Scorers(weak=0.25))


@pytest.fixture
def base() -> Denoiser:
    return tiny_model().denoiser.requires_grad_(False)


def call(network: Denoiser, how: Call = Call()) -> Tensor:
    rng, cond = Rng(5), Cond(Rng(5).randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    return network(rng.randn((2, 4, FRAMES, 8, 8), "x"), torch.tensor([0.3, 0.9]), cond, how).raw


def moved(network: Denoiser, seed: int = 1) -> Denoiser:
    """With adapters that are not zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.1 * Rng(seed).randn(tuple(parameter.shape), name))
    return network


def test_adapters_at_zero_are_the_teacher_bit_for_bit(base: Denoiser) -> None:
    network = adapt(base, LORA, Rng(0))
    assert torch.equal(call(network), call(base))
    assert torch.equal(call(merge(base, network)), call(base))
    assert not torch.equal(call(moved(network)), call(base))


def test_adapters_begin_as_peft_draws_them(base: Denoiser) -> None:
    """A is uniform within the root of 1 / in, another one in every layer; B is zero."""
    layers = adapters(adapt(base, LORA, Rng(0)))
    for layer in layers.values():
        bound = layer.weight.shape[1] ** -0.5
        a = layer.lora_A.weight.detach()
        assert 0.9 * bound < float(a.abs().max()) <= bound and abs(float(a.mean())) < 0.25 * bound
        assert not layer.lora_B.weight.any() and layer.scale == 8.0 / 4
    first, second = (layers[f"backbone.blocks.{i}.attention.qkv"].lora_A.weight for i in (0, 1))
    assert not torch.equal(first, second)


def test_every_weight_but_the_adapters_is_borrowed(base: Denoiser) -> None:
    network = adapt(base, LORA, Rng(0))
    assert all(".lora_" in name for name, _ in network.named_parameters())
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    theirs = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert all(tensor.data_ptr() in theirs for name, tensor in network.named_buffers())
    with torch.no_grad():
        base.backbone.out.bias += 1
    assert torch.equal(call(network), call(base))


def test_a_backward_pass_reaches_adapters_only(base: Denoiser) -> None:
    network = moved(adapt(base, LORA, Rng(0)))
    call(network).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_merged_weights_compute_the_same(base: Denoiser) -> None:
    network = moved(adapt(base, LORA, Rng(0)))
    whole = merge(base, network)
    assert torch.allclose(call(whole), call(network), atol=1e-5)
    assert not torch.allclose(call(whole), call(base), atol=1e-3)
    assert {name for name, _ in whole.named_parameters()} == {name for name, _ in base.named_parameters()}
    assert merge(base, base) is base


def test_merged_weights_are_written_one_at_a_time(base: Denoiser, tmp_path: Path) -> None:
    """The same bits as those of a merged network, which is never in memory."""
    network, seen = moved(adapt(base, LORA, Rng(0))), list[weakref.ref[Tensor]]()
    weights, here = Merged(base.state_dict(), network), {x.data_ptr() for x in base.state_dict().values()}

    def read(name: str) -> Tensor:
        value = weights[name]
        if value.data_ptr() not in here:
            seen.append(weakref.ref(value))
        assert sum(ref() is not None for ref in seen) <= 2  # the one before is let go of when this one is there
        return value

    write_tensors(tmp_path / "file.safetensors", base.state_dict(), read)
    written, whole = load_file(tmp_path / "file.safetensors"), merge(base, network).state_dict()
    assert len(seen) == len(adapters(network)) > 4 and written.keys() == whole.keys()
    assert all(torch.equal(written[name], whole[name]) for name in whole)


def test_written_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "none": torch.zeros(0, 3), "one": torch.tensor(1.5), "half": torch.randn(3, 5).bfloat16(), "yes": torch.tensor([True]),
        "turned": torch.randn(4, 6).T, "narrow": torch.arange(-3, 4, dtype=torch.int8), "wide": torch.ones(2).double(),
    }  # fmt: skip
    write_tensors(tmp_path / "file.safetensors", tensors, tensors.__getitem__)
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_weak_adapters_lie_between_and_follow(base: Denoiser) -> None:
    critic = moved(adapt(base, LORA, Rng(0)))
    none, half, whole = (weaken(critic, scale) for scale in (0.0, 0.5, 1.0))
    assert torch.equal(call(none), call(base)) and torch.equal(call(whole), call(critic))
    assert not list(half.parameters()) and not half.state_dict()
    before = call(half)
    moved(critic, seed=2)
    assert torch.equal(call(whole), call(critic)) and not torch.equal(call(half), before)
    with pytest.raises(ValueError, match=r"settings\.lora"):
        weaken(base, 0.5)


def test_the_real_score_of_a_run_is_as_weak_as_asked_for() -> None:
    nets = build_nets(tiny_model(), DMD, seed=0, lora=LORA)
    real, critic = adapters(nets["real"]), adapters(nets["critic"])
    assert real.keys() == critic.keys() and all(real[name].scale == 0.25 * critic[name].scale for name in real)


def test_duplicates_share_the_base_and_nothing_else(base: Denoiser) -> None:
    network = adapt(base, LORA, Rng(0))
    other = duplicate(network)
    moved(other)
    assert torch.equal(call(network), call(base)) and not torch.equal(call(other), call(base))
    assert {t.data_ptr() for t in other.buffers()} == {t.data_ptr() for t in network.buffers()}
    plain = duplicate(base)
    assert not {t.data_ptr() for t in plain.parameters()} & {t.data_ptr() for t in base.parameters()}


def test_a_block_computed_again_sees_its_own_adapters(base: Denoiser) -> None:
    """Activation checkpointing, with another role called between the forward and the backward pass."""
    grads = []
    for again in (False, True):
        network, other = moved(adapt(base, LORA, Rng(0))), moved(adapt(base, LORA, Rng(0)), seed=3)
        out = call(network, Spread(checkpointing=again)(Call()))
        call(other)
        out.square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Loud(nn.Linear):
    """A linear layer of another class, as other libraries have them; it says what it read."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = hidden_states
        return super().forward(hidden_states)


def test_a_linear_layer_of_any_class_is_adapted(base: Denoiser) -> None:
    before, up = call(base), base.backbone.blocks[0].mlp.up
    up.__class__ = Loud
    network = moved(adapt(base, replace(LORA, targets=("blocks.0.mlp.up",)), Rng(0)))
    assert not torch.equal(call(network), before)
    assert network.backbone.blocks[0].mlp.up.base.seen is not None and not hasattr(up, "seen")  # its own forward runs
    assert torch.allclose(call(merge(base, network)), call(network), atol=1e-5)
    assert type(merge(base, network).backbone.blocks[0].mlp.up) is Loud


def test_what_is_inside_a_linear_layer_is_its_own_business(base: Denoiser) -> None:
    """And the output layer of torch's attention, whose weight is read and whose forward is not called."""
    block = base.backbone.blocks[0]
    block.mlp.up = LoraLinear(block.mlp.up, 2, 1.0)
    block.attention.inner = nn.MultiheadAttention(24, 2)
    found = [name for name, *_ in linears(block)]
    assert "mlp.up" in found and not any(name.startswith(("mlp.up.", "attention.inner")) for name in found)
    with pytest.raises(ValueError, match="adapters already"):
        adapt(base, LORA, Rng(0))


def test_adapters_over_eight_bits(tmp_path: Path) -> None:
    """They train, share the teacher's quantised weights, and stay beside them in the student that is saved."""
    teacher = tiny_model().transformed(Int8())
    network = moved(adapt(teacher.denoiser, LORA, Rng(0)))
    call(network).square().sum().backward()
    assert all(".lora_" in name and p.grad is not None and p.grad.any() for name, p in network.named_parameters())
    theirs = {tensor.data_ptr() for tensor in teacher.denoiser.state_dict().values()}
    assert all(tensor.data_ptr() in theirs for tensor in network.buffers()) and len(network.state_dict()) == 2 * 14
    whole = merge(teacher.denoiser, network)
    assert torch.allclose(call(whole), call(network), atol=1e-6) and not list(adapters(whole))
    student = teacher.with_part("denoiser", whole)
    assert student.card.transforms[0] == Int8() and student.card.transforms[1].rank == LORA.rank
    loaded = VideoModel.from_pretrained(student.save(tmp_path))
    assert torch.equal(call(loaded.denoiser), call(whole))
    again = moved(adapt(loaded.denoiser, replace(LORA, rank=2), Rng(1)))  # a second round over the first
    assert torch.allclose(call(merge(loaded.denoiser, again)), call(again), atol=1e-6)


def test_a_run_over_eight_bits(tmp_path: Path) -> None:
    """The same student as the run held, in bytes that are still eight; training the quantised weights is refused."""
    teacher = tiny_model().transformed(Int8(keep=("mlp.up",)))
    settings = small(3, lora=LORA)
    student = train(teacher, DMD, WorldClips(num_frames=FRAMES), settings, tmp_path, quiet=True)
    int8, branches = student.card.transforms
    assert int8 == teacher.card.transforms[0] and "blocks.0.attention.qkv" in branches.targets
    assert not any("mlp.up" in target for target in branches.targets)  # into those the update was added
    tensors = load_file(tmp_path / "student" / "denoiser.safetensors")
    qkv = "backbone.blocks.0.attention.qkv"
    assert tensors[f"{qkv}.base.quantised"].dtype == torch.int8 and tensors[f"{qkv}.up.weight"].any()
    assert not torch.equal(
        tensors["backbone.blocks.0.mlp.up.weight"], teacher.denoiser.backbone.blocks[0].mlp.up.weight
    )
    with pytest.raises(ValueError, match=r"layers are Int8.*settings\.lora"):
        prepare(teacher, DMD2(critic_updates=1), WorldClips(num_frames=FRAMES), small(3), tmp_path / "whole")


def test_a_style_lora_of_an_eight_bit_model(tmp_path: Path) -> None:
    """A file's update is not lost in rounding."""
    plain = tiny_model()
    save_adapter(moved(adapt(plain.denoiser, LORA, Rng(0))), tmp_path, "tiny")
    styled = plain.with_lora(tmp_path).denoiser
    small, both = plain.transformed(Int8()).denoiser, plain.transformed(Int8()).with_lora(tmp_path)
    error = (call(both.denoiser) - call(styled)).norm() / (call(styled) - call(small)).norm()
    assert error < 0.1 and [type(x) for x in both.transforms] == [Int8, Branches]


def test_targets_are_named_or_refused(base: Denoiser) -> None:
    network = adapt(base, replace(LORA, targets=("qkv", "mlp.up")), Rng(0))
    assert {name.split(".", 3)[-1].rpartition(".lora_")[0] for name in network.state_dict()} == {
        "attention.qkv",
        "mlp.up",
    }
    with pytest.raises(ValueError, match=r"'to_q'.*attention\.qkv"):
        adapt(base, replace(LORA, targets=("to_q",)), Rng(0))
    with pytest.raises(ValueError, match="rank"):
        Lora(rank=0)


def test_adapter_files_come_back(base: Denoiser, tmp_path: Path) -> None:
    network = moved(adapt(base, LORA, Rng(0)))
    save_adapter(network, tmp_path, "tiny")
    assert torch.equal(call(load_adapter(base, tmp_path)), call(network))
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(base, tmp_path, "tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["qkv"]}))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(base, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter(base, tmp_path / "nowhere")


def test_peft_reads_them(base: Denoiser, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network = moved(adapt(base, LORA, Rng(0)))
    save_adapter(network, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(duplicate(base), tmp_path)
    assert torch.allclose(call(theirs), call(network), atol=1e-6)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks(base: Denoiser, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend traces both directions and generates no code; code is generated in test_models.py, too."""
    if backend == "inductor" and (problem := compile_problem()):
        pytest.skip(problem)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network = moved(adapt(base, LORA, Rng(0)))
    before = call(network)
    view = weaken(network, 1.0)
    network.backbone.compile_blocks()
    view.backbone.compile_blocks()
    assert torch.allclose(call(network), before, atol=1e-5) and torch.allclose(call(view), before, atol=1e-5)
    call(network).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert torch.equal(call(duplicate(network)), before)


def settings(steps: int) -> Settings:
    return small(steps, lora=LORA, save_every=2, ema=0.5, optim={"student": Optim(lr=1e-2)})


def test_a_run_trains_adapters_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, data = tiny_model(), WorldClips(num_frames=FRAMES)
    before = fingerprint(model.denoiser)
    whole = train(model, DMD, data, settings(4), tmp_path / "whole", quiet=True)
    assert fingerprint(model.denoiser) == before != fingerprint(whole.denoiser)
    run = prepare(tiny_model(), DMD, data, settings(4), tmp_path / "half")
    run.iterate()
    run.iterate()
    run.state().save(tmp_path / "half" / "checkpoints")
    resumed = train(tiny_model(), DMD, data, settings(4), tmp_path / "half", quiet=True)
    assert fingerprint(resumed.denoiser) == fingerprint(whole.denoiser)


def test_checkpoints_hold_adapters_and_students_are_whole(tmp_path: Path) -> None:
    student = train(tiny_model(), DMD, WorldClips(num_frames=FRAMES), settings(2), tmp_path, quiet=True)
    run = prepare(tiny_model(), DMD, WorldClips(num_frames=FRAMES), settings(2), tmp_path)
    components = run.state().components
    assert {"student", "critic", "ema"} <= set(components) and "real" not in components
    assert all(".lora_" in name for name in components["student"])
    folder = tmp_path / "student"
    assert set(load_file(folder / "denoiser.safetensors")) == set(tiny_model().denoiser.state_dict())
    again = VideoModel.from_pretrained(folder)
    assert fingerprint(again.denoiser) == fingerprint(student.denoiser)
    adapters = load_adapter(tiny_model().denoiser, folder / "adapter")
    assert torch.equal(call(merge(tiny_model().denoiser, adapters)), call(again.denoiser))


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_averages_of_adapters_are_averages_of_what_they_do(decay: float) -> None:
    """A target that follows a student whose A and B both move, beside the true average of its updates."""
    nets = build_nets(tiny_model(), Consistency(), 0, LORA)
    student, target = adapters(nets.student), adapters(nets.target)
    true = {name: layer.update.detach().double() for name, layer in target.items()}
    drift = {name: 0.002 * Rng(7).randn(tuple(p.shape), name) for name, p in nets.student.named_parameters()}
    for step in range(1, 51):
        with torch.no_grad():
            for name, parameter in nets.student.named_parameters():
                parameter.add_(drift[name] + 0.001 * Rng(8, step).randn(tuple(parameter.shape), name))
        blend(nets.target, nets.student, decay)
        true = {name: decay * kept + (1 - decay) * student[name].update.detach() for name, kept in true.items()}
        if step in (1, 5, 50):
            made, wanted = (torch.cat([x.flatten() for x in each]).double() for each in (
                [layer.update.detach() for layer in target.values()], list(true.values())
            ))  # fmt: skip
            assert float((made - wanted).norm() / wanted.norm()) < 0.02, step
            assert float(torch.cosine_similarity(made, wanted, dim=0)) > 0.9998, step


def test_roles_of_one_source_start_equal_and_copies_are_exact(base: Denoiser) -> None:
    nets = build_nets(tiny_model(), DMD, 0, LORA)
    for name, layer in adapters(nets.student).items():
        assert torch.equal(layer.lora_A.weight, adapters(nets.critic)[name].lora_A.weight)
    assert len({float(layer.lora_A.weight.std()) for layer in adapters(nets.student).values()}) > 1
    one, other = (moved(adapt(base, LORA, Rng(0)), seed=seed) for seed in (1, 2))
    blend(one, other, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    blend(one, other, 0.5)
    assert torch.allclose(call(one), call(other), atol=1e-5)  # the average of equals


def test_an_average_of_a_narrow_layer_loses_nothing() -> None:
    """A rank above what the layer is wide: every update has it."""
    made = []
    for seed in (0, 1):
        layer = LoraLinear(torch.nn.Linear(3, 5), rank=4, scale=2.0)
        for name, parameter in layer.named_parameters():
            parameter.data = Rng(seed).randn(tuple(parameter.shape), name)
        made.append(layer)
    wanted = 0.7 * made[0].update + 0.3 * made[1].update
    made[0].average(made[1], 0.7)
    assert torch.allclose(made[0].update, wanted, atol=1e-5)


@pytest.mark.parametrize("method", [Progressive(stages=((2, 1), (1, 2))), Consistency()], ids=["Progressive", "target"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_other_methods_train_adapters(method, optim, tmp_path: Path) -> None:
    model, optims = tiny_model(), {"student": Optim(type=optim, lr=1e-3)}
    before = fingerprint(model.denoiser)
    student = train(
        model, method, WorldClips(num_frames=FRAMES), small(3, lora=LORA, optim=optims), tmp_path, quiet=True
    )
    assert fingerprint(model.denoiser) == before != fingerprint(student.denoiser)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    data = WorldClips(num_frames=FRAMES)
    with pytest.raises(ValueError, match=r"settings\.lora is for denoisers"):
        prepare(tiny_model(), Reconstruction(), data, small(1, lora=LORA), tmp_path)
    with pytest.raises(ValueError, match=r"set settings\.lora"):
        prepare(tiny_model(), DMD, data, small(1), tmp_path)
    with pytest.raises(ValueError, match="weak"):
        Scorers(weak=1.0)
    for cut in (Parallel(shard=2), Parallel(replicate=2), Parallel(offload=True)):
        with pytest.raises(ValueError, match="write checkpointing: true, so that each comes again"):
            prepare(tiny_model(), DMD, data, small(1, lora=LORA, parallel=cut), tmp_path)


class Linear(nn.Module):
    """A denoiser that is linear in its weights: x0 = W x_t, with adapters or without."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.path = layer, RF

    def forward(self, x_t: Tensor, t: Tensor, *rest: object) -> Prediction:
        return Prediction(self.layer(x_t), "x0", x_t, t, RF)


def test_a_weakened_teacher_leaves_one_minus_its_share_of_the_gradient() -> None:
    """MagicDistillation: at 0 DMD's own, bit for bit; at 1 nothing; in between the exact share, where weights act linearly."""
    plain = nn.Linear(8, 8, bias=False, dtype=torch.float64).requires_grad_(False)
    torch.manual_seed(0)
    adapted = LoraLinear(plain, 3, 0.7)
    for matrix in adapted.parameters():
        nn.init.normal_(matrix)
    teacher, critic = Linear(plain), Linear(adapted).requires_grad_(False)
    method = DMD2(guidance=CFG(), rollout=ONE_STEP, matching=ReverseKL(weight="one"))
    batch, found = Batch(cond_of(1, 4), cond_of(0, 4), (1, 2, 4, 8)), {}
    for share in (None, 0.0, 0.25, 0.5, 1.0):
        student = FreeClips((4, 1, 2, 4, 8))
        held = method if share is None else replace(method, scorers=Scorers(weak=0.5))
        real = {} if share is None else {"real": weaken(critic, share)}  # type: ignore[arg-type]
        nets = Nets({"student": student, "teacher": teacher, "critic": critic, **real})
        next(held.student_loss(nets, batch, Rng(0)))["matching"].backward()
        found[share] = student.clips.grad
    assert found[None] is not None and found[None].any() and torch.equal(found[0.0], found[None])
    for share in (0.25, 0.5, 1.0):
        torch.testing.assert_close(found[share], (1 - share) * found[None], rtol=1e-12, atol=1e-15)


def test_weak_real_score_shrinks_the_matching_gradient() -> None:
    """At scale 0 it is DMD2's own; at scale 1 real and fake are one score, and nothing is left."""
    model = tiny_model()
    method = DMD2(guidance=CFG(), rollout=ONE_STEP, scorers=Scorers(weak=0.5))
    nets = dict(build_nets(model, method, 0, LORA))
    moved(nets["critic"])
    with torch.no_grad():
        cond, uncond = model.text.encode(["a red ball"] * 2), model.text.encode([""] * 2)
    batch, x, t = (
        Batch(cond, uncond, (4, FRAMES, 8, 8)),
        Rng(1).randn((2, 4, FRAMES, 8, 8), "x"),
        torch.tensor([0.3, 0.7]),
    )
    gaps = []
    for scale in (0.0, 0.5, 1.0):
        weak = Nets({**nets, "real": weaken(nets["critic"], scale)})
        scores = method.scores(weak, weak, batch)
        with torch.no_grad():
            gaps.append(float((scores.real(x, t) - scores.fake(x, t)).norm()))
    assert gaps[0] > gaps[1] > gaps[2] == 0.0
