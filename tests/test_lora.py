"""Adapters: equal to the teacher at zero, one frozen set of weights, checkpoints of adapters only, peft's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import CFG
from fewstep.engine import Optim, Parallel, Settings, train
from fewstep.engine.compiling import compile_problem
from fewstep.engine.nets import build_nets
from fewstep.engine.prepare import prepare
from fewstep.methods import DMD2, Consistency, Nets, Progressive, Reconstruction
from fewstep.models import Denoiser, Lora, VideoModel, fingerprint
from fewstep.models.lora import adapt, adapters, duplicate, load_adapter, merge, save_adapter, weaken
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import ONE_STEP

pytestmark = pytest.mark.usefixtures("single_thread")
LORA = Lora(rank=4, alpha=8.0)
DMD = DMD2(critic_updates=1, weak=0.25)


@pytest.fixture
def base() -> Denoiser:
    return tiny_model().denoiser.requires_grad_(False)


def call(network: Denoiser) -> Tensor:
    rng, cond = Rng(5), Cond(Rng(5).randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    return network(rng.randn((2, 4, FRAMES, 8, 8), "x"), torch.tensor([0.3, 0.9]), cond).raw


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
        if again:
            network.backbone.spread(None, checkpointing=True)
        out = call(network)
        call(other)
        out.square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


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
def test_compiled_blocks(base: Denoiser) -> None:
    if problem := compile_problem():
        pytest.skip(problem)
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
        DMD2(weak=1.0)
    with pytest.raises(ValueError, match=r"settings\.parallel\.offload .* leave out one of the two"):
        prepare(tiny_model(), DMD, data, small(1, lora=LORA, parallel=Parallel(offload=True)), tmp_path)
    for cut in (Parallel(shard=2), Parallel(replicate=2)):
        with pytest.raises(ValueError, match="leave out shard and replicate"):
            prepare(tiny_model(), DMD, data, small(1, lora=LORA, parallel=cut), tmp_path)


def test_weak_real_score_shrinks_the_matching_gradient() -> None:
    """At scale 0 it is DMD2's own; at scale 1 real and fake are one score, and nothing is left."""
    model = tiny_model()
    method = DMD2(guidance=CFG(), rollout=ONE_STEP, weak=0.5)
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
        real, fake = method.scores(weak, batch, x, t)
        gaps.append(float((real - fake).norm()))
    assert gaps[0] > gaps[1] > gaps[2] == 0.0
