"""What sampling a model is: the contract's sampler, from the path's own noise of each clip's seed, guided as the card says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fewstep.attention import NAG, BlockCausal
from fewstep.caching import SkipMiddle
from fewstep.compress import ScalarInput
from fewstep.core import Call, Seeds
from fewstep.core.call import Constants, Place, S
from fewstep.diffusion import CFG, EDM, Contract, Heun, Prediction
from fewstep.models import VideoModel, sampling
from fewstep.models.repattern import repattern
from fewstep.models.runtime import Runtime, effective
from fewstep.models.sampling import Lead
from support_engine import shaken, tiny_model
from tiny_models import load_tiny

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a small red ring", "a large blue disc")


@torch.no_grad()
def test_a_clip_is_the_samplers_from_its_own_noise_guided_by_the_card() -> None:
    tiny = tiny_model(path=EDM(sigma_max=5.0), kind="eps")
    contract = Contract(sampler=Heun(), steps=2, guidance=CFG(scale=2.5))
    model = VideoModel(replace(tiny.card, contract=contract, negative_prompt="a grey box"), tiny.parts)
    made = model.latents(PROMPTS, seed=5)
    cond, negative = model.text.encode(PROMPTS), model.text.encode(["a grey box", "a grey box"])

    def guided(x: torch.Tensor, t: torch.Tensor, call: Call) -> Prediction:
        plain, free = model.denoiser(x, t, cond), model.denoiser(x, t, negative)
        return plain.with_raw(free.raw + 2.5 * (plain.raw - free.raw))

    noise = Seeds((5, 6))
    start = 5.0 * noise.randn((2, *model.latent_shape()), "start")  # sigma_max
    expected = Heun()(guided, start, (1.0, 0.5, 0.0), rng=noise)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(model.latents([prompt], seed=5 + row)[0], made[row], rtol=1e-4, atol=1e-4)
    chosen = model.latents(PROMPTS, seed=(6, 5))
    assert not torch.allclose(chosen, made, atol=1e-2)


def student_of(model: VideoModel) -> VideoModel:
    contract = replace(model.card.contract, guidance=CFG())
    return VideoModel(replace(model.card, contract=contract, role="student"), model.parts)


def test_a_student_is_not_guided_a_second_time() -> None:
    model = student_of(tiny_model())
    with pytest.raises(
        ValueError, match=r"guidance was distilled into this student; guidance_scale=3\.0 would apply it twice"
    ):
        model.latents(PROMPTS, guidance_scale=3.0)
    plain, forced = (model.latents(PROMPTS, guidance_scale=scale, force=scale > 1) for scale in (1.0, 3.0))
    assert torch.equal(plain, model.latents(PROMPTS)) and not torch.allclose(plain, forced)
    assert not torch.equal(tiny_model().latents(PROMPTS, guidance_scale=3.0), tiny_model().latents(PROMPTS))


def test_another_length_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="makes clips of 4 frames and was asked for 6"):
        model.latents(PROMPTS, num_frames=6)
    assert model.latents(PROMPTS, num_frames=6, force=True).shape[2] == 6


def test_a_request_brings_its_runner() -> None:
    model, seen = tiny_model(), []

    def noted(block: Callable[[S], S], state: S, place: Place) -> S:
        seen.append((place.call.step, place.layer, place.call.branch))
        return block(state)

    assert torch.equal(model.latents(PROMPTS, runner=noted), model.latents(PROMPTS))
    assert seen == [(step, layer, "both") for step in range(3) for layer in range(2)]


def test_another_pattern_over_the_same_tensors() -> None:
    """The first network reads as before, and what is saved of the second says what it reads."""
    dense = tiny_model()
    causal = repattern(dense.denoiser, BlockCausal(chunk=1))
    assert [p.data_ptr() for p in causal.parameters()] == [p.data_ptr() for p in dense.denoiser.parameters()]
    x, t, cond = torch.randn(2, 4, 4, 8, 8), torch.full((2,), 0.5), dense.text.encode(PROMPTS)
    changed = x.clone()
    changed[:, :, -1] += 1
    for network, leaks in ((dense.denoiser, True), (causal, False)):
        before, after = (network(y, t, cond).raw[:, :, 0] for y in (x, changed))
        assert torch.equal(before, after) is not leaks
    assert causal.backbone.args == {**dense.denoiser.backbone.args, "pattern": BlockCausal(chunk=1).tree()}


# --- numbers that the network reads ------------------------------------------------------------------------------------


def reading(*transforms: ScalarInput) -> VideoModel:
    model = tiny_model().transformed(*transforms)
    shaken(model.denoiser.backbone.scalars, 0.5)
    return model


def test_scalars_are_what_the_network_reads() -> None:
    """The same clips as with the number in both conditions; other numbers make other clips."""
    model = reading(ScalarInput(name="guidance", scale=10.0), ScalarInput(name="until", default=0.5))
    made = model.latents(PROMPTS, scalars={"guidance": 4.0})
    cond, uncond = model.encode_text(PROMPTS)
    said = {"guidance": torch.full((2,), 4.0), "until": torch.full((2,), 0.5)}
    cond, uncond = cond.with_extra(said), uncond.with_extra(said)
    noise = Seeds((0, 1))
    start = model.denoiser.path.prior(noise.randn((2, *model.latent_shape()), "start"))
    contract = model.card.contract

    @torch.no_grad()
    def guided(x: torch.Tensor, t: torch.Tensor, call: Call) -> Prediction:
        return contract.guidance(model.denoiser, x, t, cond, uncond, call)

    assert torch.equal(made, contract.sampler(guided, start, contract.times(None), rng=noise))
    assert torch.equal(made, model.latents(PROMPTS, scalars={"guidance": 4, "until": 0.5}))
    for other in ({"guidance": 5.0}, {"guidance": 4.0, "until": 0.1}):
        assert not torch.allclose(made, model.latents(PROMPTS, scalars=other), atol=1e-3)


def test_scalars_that_are_not_read_not_given_or_no_numbers_are_refused() -> None:
    """Before the first step is made."""
    model = reading(ScalarInput(name="guidance"), ScalarInput(name="until", default=0.5))
    with pytest.raises(ValueError, match=r"'tiny' reads 'guidance', which has no default; .*--scalar guidance=4\.0"):
        model.sampling(PROMPTS)
    with pytest.raises(ValueError, match=r"does not read 'shift'; the scalars that it reads: guidance, until"):
        model.sampling(PROMPTS, scalars={"guidance": 4.0, "shift": 1.0})
    with pytest.raises(ValueError, match="the scalars that it reads: none"):
        tiny_model().sampling(PROMPTS, scalars={"guidance": 4.0})
    for wrong in ("4", True, float("nan"), None, torch.ones(2)):
        with pytest.raises(ValueError, match="guidance must be a finite number, such as 4.0, got"):
            model.sampling(PROMPTS, scalars={"guidance": wrong})


# --- what a run computes once ------------------------------------------------------------------------------------------


class Counted:
    """Calls of a network's layers, by the end of their names."""

    def __init__(self, network: torch.nn.Module, *ends: str) -> None:
        self.calls: Counter[str] = Counter()
        for name, module in network.named_modules():
            for end in ends:
                if name.endswith(end):
                    module.register_forward_hook(lambda *_, end=end: self.calls.update([end]))


@pytest.mark.parametrize("family", ["world", "wan", "wan_image", "ltx", "wan_experts"])
def test_values_that_no_step_changes_change_no_clip(family: str) -> None:
    model = tiny_model() if family == "world" else load_tiny(family)
    shown = {"image": torch.zeros(1, 3, model.card.height, model.card.width)} if "image" in model.parts else {}
    options: dict[str, Any] = {"num_inference_steps": 3, "seed": 3, **shown}
    kept = model.latents(PROMPTS, **options)
    with mock.patch.object(sampling, "Constants", return_value=None):
        assert torch.equal(model.latents(PROMPTS, **options), kept)
    assert not torch.equal(model.latents(PROMPTS[::-1], **options), kept)


@pytest.mark.parametrize(("family", "words"), [("world", "cross.kv"), ("wan", "attn2.to_k"), ("ltx", "attn2.to_k")])
def test_the_text_is_read_once_in_a_run(family: str, words: str) -> None:
    model = tiny_model() if family == "world" else load_tiny(family)
    blocks = len(model.denoiser.backbone.blocks)
    model = model.with_card(contract=Contract(steps=4, guidance=CFG(scale=3.0)))
    counted = Counted(model.denoiser, words)
    model.latents(PROMPTS)
    assert counted.calls == {words: blocks}
    model.latents(PROMPTS)
    assert counted.calls == {words: 2 * blocks}, "another run has its own"


def test_each_expert_reads_the_text_once() -> None:
    """They take turns at 0.6. What the first one kept is gone when the second begins."""
    model, seen = load_tiny("wan_experts"), []
    model = model.with_card(contract=Contract(steps=5, guidance=CFG(scale=3.0)))
    counted = Counted(model.denoiser, "attn2.to_k", "text_embedder.linear_1")
    with mock.patch.object(sampling, "Constants", side_effect=lambda: seen.append(Constants()) or seen[-1]):
        model.latents(PROMPTS)
    blocks = len(model.denoiser.backbone.blocks)
    assert counted.calls == {"attn2.to_k": 2 * blocks, "text_embedder.linear_1": 2}
    ((route, kept),) = seen[0].kept.values()
    assert route == ((), (0, 1, 2, 3)) and {key[1:] for key in kept.kept if key[0] == "both"} == {
        ("text", layer) for layer in range(blocks)
    }


def test_runs_in_turns_keep_their_own_values() -> None:
    model = tiny_model().with_card(contract=Contract(steps=3, guidance=CFG(scale=3.0)))
    turns = [model.sampling([prompt], seed=1) for prompt in PROMPTS]
    last = [list(steps) for steps in zip(*turns, strict=True)][-1]
    for prompt, step in zip(PROMPTS, last, strict=True):
        assert torch.equal(step.x, model.latents([prompt], seed=1))


# --- guidance in two calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["world", "wan", "ltx", "wan_experts", "cogvideox"])
def test_guidance_in_two_calls_makes_the_same_clip(family: str) -> None:
    """In float64, where rounding hides nothing; with the text of each prompt read once, and a cache for each."""
    model = tiny_model(depth=4) if family == "world" else load_tiny(family)
    model = model.with_card(contract=replace(model.card.contract, steps=4)).prepared(Runtime(dtype="float64"))
    runs = [{}, {"runner": SkipMiddle(every=2).begin()}] + [{"nag": NAG()}] * (family != "cogvideox")
    one = [model.latents(PROMPTS, **options) for options in runs]
    model.prepared(Runtime(dtype="float64", guidance_calls="two"))
    assert "in two calls" in effective(model)["guidance"]
    sizes: list[int] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    runs[1] = {"runner": SkipMiddle(every=2).begin()}
    for made, options in zip(one, runs, strict=True):
        torch.testing.assert_close(model.latents(PROMPTS, **options), made, rtol=1e-6, atol=1e-6)
    hook.remove()
    assert sizes == [2] * 8 * len(runs)
    if family == "wan":
        counted = Counted(model.denoiser, "attn2.to_k")
        model.latents(PROMPTS)
        assert counted.calls == {"attn2.to_k": 2 * len(model.denoiser.backbone.blocks)}


# --- first steps of another model --------------------------------------------------------------------------------------


def test_the_teacher_makes_the_first_steps_with_its_own_guidance() -> None:
    """Each step is the sampler's, with the prediction of whoever makes it."""
    teacher = tiny_model().with_card(contract=Contract(guidance=CFG(scale=3.0)))
    student = student_of(tiny_model(seed=1))
    grid = student.card.contract.times(4)
    steps = list(student.sampling(PROMPTS, num_inference_steps=4, seed=2, force=True, lead=Lead(teacher, 2)))
    (cond, negative), (own, _) = teacher.conditions(PROMPTS), student.conditions(PROMPTS)
    x = Seeds((2, 3)).randn((2, *student.latent_shape()), "start")
    for step, t, s in zip(steps, grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            time = torch.full((2,), t)
            led = CFG(scale=3.0)(teacher.denoiser, x, time, cond, negative)
            flow = led.raw if step.index < 2 else student.denoiser(x, time, own).raw
        x = x + (s - t) * flow
        torch.testing.assert_close(step.x, x, rtol=1e-4, atol=1e-4)


def test_a_lead_that_does_not_fit_is_refused() -> None:
    student = student_of(tiny_model())
    for steps in (0, 2):
        with pytest.raises(ValueError, match=f"can have 1 to 1 of its first by the teacher, not {steps}"):
            student.latents(PROMPTS, num_inference_steps=2, force=True, lead=Lead(tiny_model(), steps))
    with pytest.raises(
        ValueError, match="its noise path is EDM.* give the teacher that this student was distilled from"
    ):
        student.latents(PROMPTS, num_inference_steps=2, force=True, lead=Lead(tiny_model(path=EDM()), 1))
