"""Normalized attention guidance: a negative prompt inside the attention to the prompt, without a second call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fewstep.attention import NAG
from fewstep.cli import main
from fewstep.core import Call, Rng
from fewstep.core.call import Negative
from fewstep.data.video import read_note
from fewstep.diffusion import CFG, Contract
from fewstep.models import VideoModel, sampling
from fewstep.models.bundle import read_card
from fewstep.models.offload import Blockwise
from fewstep.models.sampling import Lead, require_nag
from support_engine import tiny_model
from tiny_models import load_tiny, save_tiny

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball", "a cat walks")
STRONG = NAG(scale=20.0, tau=10.0, alpha=1.0)
FAMILIES = ("world", "wan", "wan_image", "ltx", "wan_experts")


def by_hand(given: Tensor, negative: Tensor, nag: NAG) -> Tensor:
    """Token by token, as the authors' code says it: z+ s - z- (s - 1), its norm at most tau times that of z+, a mean of both."""
    out = torch.empty_like(given)
    for b in range(given.shape[0]):
        for n in range(given.shape[2]):
            plus, minus = given[b, :, n].flatten(), negative[b, :, n].flatten()
            pushed = plus * nag.scale - minus * (nag.scale - 1)
            ratio = float(pushed.abs().sum() / plus.abs().sum())
            pushed = pushed * (min(ratio, nag.tau) / ratio)
            out[b, :, n] = (nag.alpha * pushed + (1 - nag.alpha) * plus).reshape(out[b, :, n].shape)
    return out


def values(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """What 5 tokens of 2 clips read; the second token reads almost the same of both prompts, so nothing clips it."""
    given, negative = (Rng(0).randn((2, 3, 5, 4), name).to(dtype) for name in ("given", "negative"))
    negative[:, :, 1] = given[:, :, 1] + 0.01 * negative[:, :, 1]
    return given, negative


@pytest.mark.parametrize(
    "nag", [NAG(), NAG(scale=3.0, tau=1.5, alpha=0.6), NAG(scale=4.0, tau=100.0, alpha=1.0)], ids=str
)
def test_nag_by_hand(nag: NAG) -> None:
    given, negative = values()
    torch.testing.assert_close(nag(given, negative), by_hand(given, negative, nag), rtol=1e-12, atol=1e-12)


def test_it_is_off_at_scale_1_at_alpha_0_and_for_equal_prompts() -> None:
    given, negative = values()
    assert torch.equal(NAG(alpha=0.0)(given, negative), given)
    for off in (NAG(scale=1.0)(given, negative), NAG()(given, given)):
        torch.testing.assert_close(off, given, rtol=1e-14, atol=0)


def test_tau_is_the_largest_growth_and_is_reached() -> None:
    given, negative = values()
    growth = NAG(tau=1.5, alpha=1.0)(given, negative).abs().sum((1, 3)) / given.abs().sum((1, 3))
    assert growth.max() <= 1.5 + 1e-12 and (growth - 1.5).abs().min() < 1e-12
    free = NAG(tau=1e9, alpha=1.0)(given, negative).abs().sum((1, 3)) / given.abs().sum((1, 3))
    assert free.max() > 5


def test_norms_are_summed_in_float32_and_nothing_that_is_read_is_left_as_it_is() -> None:
    given, negative = values(torch.bfloat16)
    made = NAG()(given, negative)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), by_hand(given.double(), negative.double(), NAG()), rtol=0.02, atol=0.02)
    nothing = torch.zeros(1, 2, 3, 4)
    assert torch.equal(NAG()(nothing, nothing), nothing)
    assert torch.equal(NAG(alpha=1.0)(nothing, nothing + 1), nothing), "tau times nothing"


@pytest.mark.parametrize(("wrong", "said"), [
    ({"scale": 0.5}, "nag scale must be at least 1, got 0.5"),
    ({"tau": 0.5}, "nag tau must be at least 1, got 0.5"),
    ({"alpha": 1.5}, "nag alpha must be at least 0 and at most 1, got 1.5"),
    ({"scale": float("nan")}, "nag scale must be at least 1, got nan"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NAG(**wrong)


# --- in a network -----------------------------------------------------------------------------------------------------


def student(family: str, **card: Any) -> tuple[VideoModel, dict[str, Any]]:
    """A model without guidance, with a negative prompt, and what one of images needs."""
    model = tiny_model() if family == "world" else load_tiny(family)
    shown = {"image": torch.zeros(1, 3, model.card.height, model.card.width)} if "image" in model.parts else {}
    contract = Contract(steps=3, guidance=CFG())
    return model.with_card(contract=contract, negative_prompt="the dark rain", **card), shown


@torch.no_grad()
def test_only_the_attention_to_the_text_is_pushed() -> None:
    """A block by hand in float64: the result of its cross-attention is replaced, and nothing else."""
    model = tiny_model()
    network = model.denoiser.double().backbone
    cond, negative = model.text.encode([PROMPTS[0]]), model.text.encode(["the dark rain"])
    x, t = Rng(0).randn((1, *model.latent_shape()), "x").double(), torch.full((1,), 0.5, dtype=torch.float64)
    call = Call(negative=Negative(negative, NAG(scale=5.0)))
    start, plain = network.embed(x, t, cond, call), network.embed(x, t, cond)
    assert torch.equal(start.x_BNE, plain.x_BNE) and torch.equal(start.time_BGE, plain.time_BGE)
    block, seen = network.blocks[0], []
    hook = block.cross.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    text, mask = negative.text.double(), negative.mask[:, None, None]
    other = replace(plain, context=plain.context._replace(text_BLE=text, text_mask_B11L=mask))
    block(start), block(plain), block(other)
    hook.remove()
    pushed, given, away = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in seen)
    torch.testing.assert_close(pushed, by_hand(given, away, NAG(scale=5.0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_negative_prompt_is_the_one_that_is_pushed_away_from(family: str) -> None:
    """With constants and without them the same bits; off it changes nothing; and it is no second call."""
    model, shown = student(family)
    calls = []
    hook = model.denoiser.register_forward_pre_hook(lambda *given: calls.append(len(given[1][0])))
    plain, pushed = (model.latents(PROMPTS, nag=nag, **shown) for nag in (None, STRONG))
    hook.remove()
    assert calls == [2] * 6, "one call per step, of the clips alone"
    assert (pushed - plain).norm() > 1e-3 * plain.norm()
    assert torch.equal(model.latents(PROMPTS, nag=NAG(alpha=0.0), **shown), plain)
    with mock.patch.object(sampling, "Constants", return_value=None):
        assert torch.equal(model.latents(PROMPTS, nag=STRONG, **shown), pushed)
    same = model.with_card(negative_prompt=PROMPTS[0])
    first, second = (same.latents(PROMPTS, nag=STRONG, **shown) - plain).flatten(1).norm(dim=1)
    assert first < 1e-4 * plain.norm() < second


@pytest.mark.parametrize("family", ["world", "wan_experts"])
def test_with_guidance_the_negative_pass_is_as_it_was(family: str) -> None:
    """As in the authors' pipeline: the prompt's prediction is pushed, then guided away from the plain negative one."""
    model, nag = student(family)[0].with_card(contract=Contract(steps=1, guidance=CFG(scale=3.0))), STRONG
    (cond, uncond), t, seen = model.conditions(PROMPTS), torch.ones(2), []
    *_, step = model.sampling(PROMPTS, nag=nag)
    with torch.no_grad():
        seen.append(model.denoiser(step.prediction.x_t, t, cond, Call(negative=Negative(uncond, nag))).raw)
        seen.append(model.denoiser(step.prediction.x_t, t, uncond).raw)
    torch.testing.assert_close(step.prediction.raw, seen[1] + 3 * (seen[0] - seen[1]), rtol=1e-4, atol=1e-4)


def test_the_teacher_s_first_steps_are_plain() -> None:
    model, _ = student("world")
    teacher = tiny_model(seed=1).with_card(contract=Contract(guidance=CFG(scale=3.0)))
    plain, pushed = (list(model.sampling(PROMPTS, lead=Lead(teacher, 2), nag=nag)) for nag in (None, STRONG))
    assert [torch.equal(a.x, b.x) for a, b in zip(plain, pushed, strict=True)] == [True, True, False]


@pytest.mark.parametrize("family", ["world", "wan_experts"])
def test_blocks_that_come_one_by_one_push_alike(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = student(family)
    pushed = model.latents(PROMPTS, nag=NAG())
    monkeypatch.setattr(
        VideoModel, "runner",
        lambda self, inner: Blockwise(self.denoiser.backbone.blocks, torch.device("cpu"), inner),
    )  # fmt: skip
    with mock.patch.object(sampling, "Constants", return_value=None):
        assert torch.equal(model.latents(PROMPTS, nag=NAG()), pushed)


def test_families_whose_text_is_beside_the_clip_are_refused() -> None:
    for family in ("cogvideox", "hunyuan"):
        network = load_tiny(family).denoiser.backbone
        with pytest.raises(
            ValueError, match=f"a {type(network).__name__} has none that fewstep reaches; VideoDiT, Wan"
        ):
            require_nag(type(network))
    model = tiny_model()
    cond, _ = model.conditions(PROMPTS)
    with pytest.raises(ValueError, match="nag reads a negative prompt too; give negative"):
        model.latents(cond, nag=NAG(), guidance_scale=1.0)


# --- the command line -------------------------------------------------------------------------------------------------

SMALL = ("--num-frames", "5", "--height", "32", "--width", "48", "--num-inference-steps", "2", "--force", "--quiet")


def test_sample_takes_a_negative_prompt_for_a_model_without_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny Wan in diffusers' layout, without guidance; and the file says how to make it again."""
    monkeypatch.chdir(tmp_path)
    save_tiny("wan", tmp_path / "wan")
    words = ["sample", "wan", "--prompt", "a red ball", *SMALL, "--guidance-scale", "1"]
    asked = ["--negative-prompt", "the dark rain"]
    assert main([*words, *asked, "--output", "x.gif"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reads no negative prompt" in said and "(--nag-scale 11), which takes one" in said
    assert main([*words, "--output", "plain.gif"]) == 0
    assert main([*words, *asked, "--nag-scale", "8", "--nag-alpha", "0.9", "--output", "nag.gif"]) == 0
    assert main(["sample", "--like", "nag.gif", "--output", "again.gif", "--quiet"]) == 0
    plain, made, again = (Path(f"{name}.gif").read_bytes() for name in ("plain", "nag", "again"))
    assert made == again != plain
    told = json.loads(read_note(Path("nag.gif")))["options"]
    assert (told["nag_scale"], told["nag_alpha"], told["negative_prompt"]) == (8.0, 0.9, "the dark rain")
    assert "nag_tau" not in told


@pytest.mark.parametrize(("words", "said"), [
    (("--nag-tau", "2"), "--nag-tau changes NAG, which is off; give --nag-scale too"),
    (("--nag-scale", "0.5"), "nag scale must be at least 1, got 0.5"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "world", "--prompt", "a", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_joint_model_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("cogvideox", tmp_path / "cogvideox")
    monkeypatch.setattr(VideoModel, "load", lambda *_, **__: pytest.fail("loaded"))
    assert read_card(folder).contract.guidance.active
    assert main(["sample", str(folder), "--prompt", "a", "--nag-scale", "5", "--output", str(tmp_path / "x.gif")]) == 2
    assert "a CogVideoX has none that fewstep reaches" in " ".join(capsys.readouterr().err.split())
