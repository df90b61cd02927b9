"""Linear layers that know the sampler's step: which step a call is at is in the call, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import BlockCausal
from fewstep.compress import Branches, Int8, Pruned, Repatterned, StepScales
from fewstep.compress.step_scales import Scaled
from fewstep.compress.stepwise import StepBlock
from fewstep.core import Call, Cond, Rng
from fewstep.diffusion import Contract, Exact, Renoise, Stream
from fewstep.engine.effective import FallbackError
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import DMD2, BackwardSimulation, Consistency
from fewstep.models import Denoiser, Lora, VideoModel
from fewstep.models.bundle import read_card
from fewstep.models.lora import adapt, merge
from fewstep.models.runtime import Runtime
from fewstep.models.spread import Spread
from fewstep.streaming import Session
from fewstep.world.data import WorldClips
from support_engine import FRAMES, shaken, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
DATA = WorldClips(num_frames=FRAMES)
FOUR = StepScales(steps=4)
DMD = DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.75, 0.5, 0.25),), grad_calls=4, exit="last"))


@pytest.fixture
def model() -> VideoModel:
    return tiny_model().transformed(FOUR)


def raw(network: Denoiser, step: int = 0, steps: int = 4) -> Tensor:
    rng = Rng(5)
    cond = Cond(rng.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    x = rng.randn((2, 4, FRAMES, 8, 8), "x")
    return network(x, torch.tensor([0.3, 0.9]), cond, Call(step=step, steps=steps)).raw


def scaled(network: nn.Module) -> list[Scaled]:
    return [module for module in network.modules() if isinstance(module, Scaled)]


def test_sampling_four_steps_uses_the_four(model: VideoModel) -> None:
    """A fresh one makes the teacher's clips, bit for bit; the scales of a step change that step and those after it."""
    plain = [step.x for step in tiny_model().sampling(["a red ball"], num_inference_steps=4)]
    fresh = [step.x for step in model.sampling(["a red ball"], num_inference_steps=4)]
    assert len(plain) == 4 and all(torch.equal(a, b) for a, b in zip(plain, fresh, strict=True))
    for k in range(4):
        for layer in scaled(model.denoiser):
            layer.scale.data.fill_(1.0)[k] = 1.5
        made = [step.x for step in model.sampling(["a red ball"], num_inference_steps=4)]
        assert [torch.equal(a, b) for a, b in zip(plain, made, strict=True)] == [i < k for i in range(4)]


def test_a_layer_is_multiplied_by_the_scales_of_its_step() -> None:
    layer, x = nn.Linear(3, 5), Rng(0).randn((2, 3), "x")
    made = Scaled(layer, 2)
    made.scale.data.copy_(Rng(0).randn((2, 5), "scale"))
    for step in range(2):
        assert torch.equal(made.at(Call(step=step, steps=2))(x), layer(x) * made.scale[step])
    assert (made.in_features, made.out_features) == (3, 5) and made.weight is layer.weight
    with pytest.raises(ValueError, match="outside of a block"):
        made(x)


def test_a_stream_of_clean_latents_is_remembered_in_the_last_step() -> None:
    """What is remembered of a chunk is made by a call of its own, at the step that comes last."""
    contract = Contract(grid=Exact(grids=((1.0, 0.5, 0.0),)), steps=2, sampler=Renoise(), stream=Stream())
    plain = tiny_model().transformed(Repatterned(pattern=BlockCausal(chunk=1)))
    plain = plain.with_part("denoiser", plain.denoiser, contract=contract)
    model = plain.transformed(StepScales(steps=2))
    chunks = [list(Session(each, ["a red ball"]).take(2)) for each in (plain, model)]
    assert all(torch.equal(a, b) for a, b in zip(*chunks, strict=True))
    seen: list[int] = []
    model.denoiser.register_forward_pre_hook(lambda _, given: seen.append(given[3].step))
    for _ in Session(model, ["a red ball"]).take(2):
        assert seen == [0, 1, 1]
        seen.clear()


def test_a_stream_keeps_no_keys_of_the_text_where_they_depend_on_the_step() -> None:
    contract = Contract(grid=Exact(grids=((1.0, 0.5, 0.0),)), steps=2, sampler=Renoise(), stream=Stream())
    model = tiny_model().transformed(Repatterned(pattern=BlockCausal(chunk=1)), StepScales(steps=2))
    model = model.with_part("denoiser", model.denoiser, contract=contract)
    shaken(model.denoiser)
    kept, plain = (Session(model, ["a red ball"]) for _ in range(2))
    plain._chunks = replace(plain._chunks, constants=None)
    assert all(torch.equal(a, b) for a, b in zip(kept.take(2), plain.take(2), strict=True))


def test_another_number_of_steps_is_refused(model: VideoModel) -> None:
    for call in ({"steps": 3}, {"steps": 1}):
        with pytest.raises(ValueError, match=rf"layers for 4 steps, and was called for step 1 of {call['steps']}"):
            raw(model.denoiser, **call)
    with pytest.raises(ValueError, match="sample it in 4 steps"):
        model.latents(["a red ball"], num_inference_steps=2)


def test_a_call_leaves_nothing_behind(model: VideoModel) -> None:
    """Two runs side by side, at different steps, are what each is alone."""
    shaken(model.denoiser)
    modules = {name: (module, dict(vars(module))) for name, module in model.denoiser.named_modules()}
    alone = [[step.x for step in model.sampling([p], num_inference_steps=4)] for p in ("a red ball", "a blue cube")]
    first, second = (model.sampling([p], num_inference_steps=4) for p in ("a red ball", "a blue cube"))
    ahead = [next(first).x, next(first).x]
    mixed = list(zip([step.x for step in second], [*ahead, *(step.x for step in first)], strict=True))
    assert all(torch.equal(a, b) for a, (_, b) in zip(alone[0], mixed, strict=True))
    assert all(torch.equal(a, b) for a, (b, _) in zip(alone[1], mixed, strict=True))
    after = dict(model.denoiser.named_modules())
    assert after.keys() == modules.keys()
    for name, (module, before) in modules.items():
        assert after[name] is module and vars(module) == before and getattr(module, "step", None) is None


def test_a_block_that_is_computed_again_is_at_its_step(model: VideoModel) -> None:
    """Two calls at different steps, one backward pass."""
    network, found = model.denoiser.requires_grad_(True), []
    shaken(network)
    rng = Rng(5)
    cond = Cond(rng.randn((1, 3, 16), "text"), torch.ones(1, 3, dtype=torch.bool))
    for checkpointing in (False, True):
        x = rng.randn((1, 4, FRAMES, 8, 8), "x")
        for step in (1, 3):
            call = Spread(checkpointing=checkpointing)(Call(step=step, steps=4))
            x = network(x, torch.tensor([0.5]), cond, call).raw
        x.square().mean().backward()
        found.append([layer.scale.grad.clone() for layer in scaled(network)])
        network.zero_grad()
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
        assert (plain[[0, 2]] == 0).all() and plain[1].any() and plain[3].any()


def test_adapters_and_branches_stand_over_it(model: VideoModel) -> None:
    shaken(model.denoiser)
    steps = [raw(model.denoiser, step) for step in range(4)]
    twin = adapt(model.denoiser, Lora(rank=2), Rng(0))
    beside = model.transformed(Branches(rank=2)).denoiser
    for step, expected in enumerate(steps):
        assert torch.equal(raw(twin, step), expected) and torch.equal(raw(beside, step), expected)
    shaken(twin)
    assert torch.allclose(raw(merge(model.denoiser, twin), 2), raw(twin, 2), atol=1e-5)
    assert not torch.allclose(raw(twin, 2), raw(twin, 1), atol=1e-3)


def test_it_stands_over_eight_bits() -> None:
    small_, plain = tiny_model().transformed(Int8(), FOUR), tiny_model().transformed(Int8())
    assert torch.equal(raw(small_.denoiser, 3), raw(plain.denoiser, 3))


def test_blocks_are_told_once_and_only_where_they_must(model: VideoModel) -> None:
    twice = model.transformed(StepScales(steps=4, targets=("mlp.up",))).denoiser.backbone
    assert all(isinstance(block, StepBlock) and not isinstance(block.inner, StepBlock) for block in twice.blocks)
    some = tiny_model().transformed(StepScales(steps=4, targets=("blocks.1.mlp.up",))).denoiser.backbone
    assert [isinstance(block, StepBlock) for block in some.blocks] == [False, True]
    assert len(tiny_model().transformed(FOUR, Pruned(blocks=(0,))).denoiser.backbone.blocks) == 1
    with pytest.raises(ValueError, match="only layers of the blocks know the step, and modulation is in none"):
        tiny_model().transformed(StepScales(steps=4, targets=("modulation",)))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        StepScales(steps=0)


def test_it_keeps_the_arithmetic_of_its_layer(model: VideoModel, tmp_path: Path) -> None:
    """In bfloat16 a fresh one changes no bit either."""
    runtime = Runtime(dtype="bfloat16")
    small_, plain = (
        VideoModel.from_pretrained(each.save(tmp_path / name), runtime=runtime)
        for each, name in ((model, "steps"), (tiny_model(), "plain"))
    )
    clips = [each.latents(["a red ball"], num_inference_steps=4) for each in (small_, plain)]
    assert torch.equal(*clips)
    with pytest.raises(
        ValueError, match="blocks whose layers depend on the step cannot be compiled; leave compile out"
    ):
        model.denoiser.backbone.compile_blocks()


# --- in a run ----------------------------------------------------------------------------------------------------------


def test_a_rollout_trains_the_scales_of_every_step(tmp_path: Path) -> None:
    """The student is called in training with the step that it has in sampling."""
    run = prepare(tiny_model(), DMD, DATA, small(1, transforms=(FOUR,), health=None), tmp_path)
    layers = scaled(run.nets.roles["student"])
    assert layers and not scaled(run.nets.roles["teacher"]) and not scaled(run.nets.roles["critic"])
    run.iterate()
    moved = torch.stack([(layer.scale != 1).any(1) for layer in layers])
    assert moved.any(0).all()  # each step's


def test_a_run_ends_as_a_student_of_four_steps(tmp_path: Path) -> None:
    from fewstep import distill

    teacher = tiny_model().save(tmp_path / "teacher")
    student = distill(
        method=DMD,
        settings=small(1, transforms=(FOUR,), health=None),
        output=tmp_path / "run",
        model=teacher,
        data=DATA,
        quiet=True,
    )
    loaded = VideoModel.from_pretrained(tmp_path / "run" / "student")
    assert loaded.card.transforms == (FOUR,) and loaded.card.contract.counts == (4,)
    clips = [each.latents(["a red ball"]) for each in (student, loaded)]
    assert torch.equal(*clips)


def test_what_cannot_know_the_step_is_refused(tmp_path: Path) -> None:
    card = read_card(tiny_model().save(tmp_path))
    settings = small(1, transforms=(FOUR,), health=None)
    for method, counts in (
        (DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0,),))), "1"),
        (Consistency(), "1, 2, 4"),
    ):
        with pytest.raises(ValueError, match=rf"for 4 steps, and the student is sampled in {counts}"):
            require_possible(method, settings, card, None)
    drawn = Consistency(steps=(4,))  # one random time per sample, and no step
    with pytest.raises(ValueError, match=r"called for step 1 of 1.*BackwardSimulation"):
        prepare(tiny_model(), drawn, DATA, settings, tmp_path).iterate()
    with pytest.raises(FallbackError, match=r"settings\.compile: layers of the student depend on the step"):
        prepare(tiny_model(), DMD, DATA, replace(settings, compile=True), tmp_path)
    run = prepare(tiny_model(), DMD, DATA, replace(settings, compile=True, allow_fallback=True), tmp_path)
    assert not run.effective.compiles and "depend on the step" in run.effective.fallbacks[0]
