"""What single families of diffusers' models do that the shared tests do not see."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from fewstep.core import Cond, RecipeError, Rng
from fewstep.diffusion import Contract, LinearQuadratic, Shifted
from fewstep.models.adapters.dits.hunyuan import HunyuanVideo
from fewstep.models.adapters.dits.ltx import LTX
from fewstep.models.adapters.flow import contract_of
from fewstep.models.bundle import read_card
from fewstep.models.source import Diffusers
from tiny_models import HUNYUAN, TINY, save_tiny

pytestmark = pytest.mark.usefixtures("single_thread")


def drawn(shape: tuple[int, ...], text: tuple[int, ...], **extra: torch.Tensor) -> tuple[torch.Tensor, Cond]:
    return Rng(0).randn(shape, "x"), Cond(Rng(0).randn(text, "text"), torch.ones(text[:2], dtype=torch.bool), extra)


# --- LTX ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [({}, 50), ({"num_frames": 9, "height": 64, "width": 64}, 7)], ids=str)
def test_the_size_of_an_ltx_clip_decides_its_times(tmp_path: Path, size: dict[str, int], steps: int) -> None:
    """As diffusers' pipeline computes them: a shift by the number of tokens, then a stretch to the last time."""
    card = Diffusers(source=str(save_tiny("ltx", tmp_path)), **size).card()
    tokens = (card.num_frames // 4 + 1) * (card.height // 32) * (card.width // 32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    mu = 0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    times = card.contract.times(steps)
    assert times == pytest.approx(scheduler.sigmas.tolist()) and times[-2] == pytest.approx(0.1)
    assert card.contract.times(1) == (1.0, 0.0)


@torch.no_grad()
def test_an_ltx_clip_is_placed_in_seconds(tmp_path: Path) -> None:
    source = Diffusers(source=str(save_tiny("ltx", tmp_path)), text_dtype="float32", **TINY["ltx"].size)
    models = [replace(source, fps=fps).load() for fps in (20, 30)]
    assert [model.denoiser.backbone.fps for model in models] == [20, 30]
    x, cond = drawn((2, *models[0].latent_shape()), (2, 3, 24))
    slow, fast = (model.denoiser(x, torch.tensor([0.5, 0.9]), cond).raw for model in models)
    assert (slow - fast).abs().max() > 1e-3


def test_published_ltx_places() -> None:
    """At 2048 values and 25 frames per second, where float32 tells angles of 15000 radians apart by a thousandth."""
    config = {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 0, "caption_channels": 8}
    theirs = LTXVideoTransformer3DModel(**config)
    ours = LTX(config=config, compression=[8, 32], fps=25)
    x, cond = drawn((1, 128, 3, 5, 7), (1, 2, 8))
    cos, sin = theirs.rope(x.flatten(2).transpose(1, 2), 3, 5, 7, (8 / 25, 32, 32))
    table = ours.embed(x, torch.ones(1), cond).context.table.transpose(1, 2).flatten(2)  # all heads of a token
    assert torch.equal(table.repeat_interleave(2, -1), torch.cat([cos, sin]))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_times_of_ltx_from_0_9_5_on(steps: int) -> None:
    times = LinearQuadratic().times(steps)
    assert times == pytest.approx((*linear_quadratic_schedule(steps).tolist(), 0.0), abs=1e-6)


def test_what_ltx_from_0_9_5_on_leaves_to_nobody(tmp_path: Path) -> None:
    """Its times: a scheduler that shifts them is refused, and so is an export, whose scheduler would not be asked."""
    source = Diffusers(source=str(save_tiny("ltx_condition", tmp_path / "model")), **TINY["ltx_condition"].size)
    model = source.load()
    assert model.codec.decode_time == 0.05 and model.codec.decode_noise == 0.025
    with pytest.raises(ValueError, match="goes by times of its own"):
        model.export(tmp_path / "out")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 3.0}))
    with pytest.raises(RecipeError, match="has times of its own, which scheduler_config.json must leave alone"):
        source.card()


# --- CogVideoX ------------------------------------------------------------------------------------------------------------


def test_what_is_published_of_cogvideox(tmp_path: Path) -> None:
    """Sizes, licences and times of both models follow from their JSON files."""
    folder = save_tiny("cogvideox", tmp_path)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"sample_frames": 49, "sample_height": 60, "sample_width": 90}
    for rotary, licence in ((True, "CogVideoX License"), (False, "Apache-2.0")):
        file.write_text(json.dumps(config | {"use_rotary_positional_embeddings": rotary}))
        card = read_card(folder)
        assert (card.num_frames, card.height, card.width, card.fps) == (49, 480, 720, 8)
        assert card.provenance["licence"] == licence and card.contract.guidance.scale == 6.0
    assert card.contract.times(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert card.path.coeffs(torch.ones(1, dtype=torch.float64)).a.abs() < 1e-12


# --- HunyuanVideo ---------------------------------------------------------------------------------------------------------


def hunyuan() -> HunyuanVideo:
    torch.manual_seed(0)
    return HunyuanVideo(config=HUNYUAN).eval()


@torch.no_grad()
def test_padding_of_a_hunyuan_prompt_is_not_read() -> None:
    ours = hunyuan()
    x, cond = drawn((2, 4, 2, 6, 10), (2, 7, 24), pooled=torch.ones(2, 12))
    cond.mask[:, 4:] = False
    changed = Cond(cond.text.clone(), cond.mask, cond.extra)
    changed.text[:, 4:] += 1
    t = torch.tensor([0.5, 0.9])
    torch.testing.assert_close(ours(x, t, changed).raw, ours(x, t, cond).raw, atol=1e-6, rtol=1e-6)
    changed.text[:, :4] += 1
    assert (ours(x, t, changed).raw - ours(x, t, cond).raw).abs().max() > 1e-3


@torch.no_grad()
def test_guidance_of_hunyuan_is_an_input_or_of_the_sampler(tmp_path: Path) -> None:
    """The distilled network is told its scale and sampled without guidance; one that was not distilled is guided."""
    folder = save_tiny("hunyuan", tmp_path)
    assert read_card(folder).contract.guidance.scale == 1.0
    assert read_card(folder).parts["denoiser"].args["guidance"] == 6.0
    x, cond = drawn((1, 4, 2, 6, 10), (1, 7, 24), pooled=torch.ones(1, 12))
    ours = hunyuan()
    before = ours(x, torch.ones(1), cond).raw
    ours.guidance = 1.0
    assert (ours(x, torch.ones(1), cond).raw - before).abs().max() > 1e-4
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": False}))
    assert read_card(folder).contract.guidance.scale == 6.0


@torch.no_grad()
def test_hunyuan_reads_clip_too(tmp_path: Path) -> None:
    source = Diffusers(source=str(save_tiny("hunyuan", tmp_path)), text_dtype="float32", **TINY["hunyuan"].size)
    text = source.load().text
    prompts = ["a red ball", "the cat walks in the rain", ""]
    states, pooled, mask = DiffusionPipeline.from_pretrained(tmp_path).encode_prompt(prompts)
    cond = text.encode(prompts)
    torch.testing.assert_close(cond.extra["pooled"], pooled, atol=1e-5, rtol=1e-5)
    assert torch.equal(cond.mask, mask.bool()) and cond.mask.sum(1).tolist() == [4, 7, 2]
    assert (cond.text[0, 0] - cond.text[1, 0]).abs().max() > 1e-3 and cond.text.shape == states.shape
    with pytest.raises(ValueError, match="reads a pooled text state too"):
        hunyuan()(torch.zeros(3, 4, 2, 6, 10), torch.ones(3), Cond(cond.text, cond.mask))


@torch.no_grad()
def test_quoted_letters_are_read_by_hunyuan_1_5(tmp_path: Path) -> None:
    """Prompts with and without them in one batch; diffusers orders its tokens otherwise, which attention does not see."""
    tiny = TINY["hunyuan15"]
    source = Diffusers(source=str(save_tiny("hunyuan15", tmp_path)), text_dtype="float32", **tiny.size)
    model, pipeline = source.load(), DiffusionPipeline.from_pretrained(tmp_path)
    cond = model.text.encode(['a box says "red" and “blue”', "a cat walks"])
    _, mask, glyphs, glyph_mask = pipeline.encode_prompt(['a box says "red" and “blue”', "a cat walks"], batch_size=2)
    torch.testing.assert_close(cond.extra["glyphs"], glyphs, atol=1e-5, rtol=1e-5)
    assert torch.equal(cond.extra["glyph_mask"], glyph_mask) and torch.equal(cond.mask, mask.bool())
    assert glyph_mask.sum(1).tolist() == [len('Text "red". Text "blue". ') + 1, 0]
    x, t = Rng(0).randn((2, *model.latent_shape()), "x"), torch.tensor([0.5, 0.9])
    made = model.denoiser(x, t, cond).raw
    torch.testing.assert_close(made, model.denoiser.backbone.original().forward(x, t, cond), atol=1e-5, rtol=1e-5)
    silent = {"glyphs": cond.extra["glyphs"], "glyph_mask": torch.zeros_like(glyph_mask)}
    changed = (model.denoiser(x, t, Cond(cond.text, cond.mask, silent)).raw - made).abs().amax((1, 2, 3, 4))
    assert changed[0] > 1e-4 and changed[1] < 1e-6
    with pytest.raises(ValueError, match="reads states of letters too"):
        model.denoiser(x, t, Cond(cond.text, cond.mask))


def test_the_guider_of_hunyuan_1_5_is_followed_or_refused(tmp_path: Path) -> None:
    file = save_tiny("hunyuan15", tmp_path) / "guider" / "guider_config.json"
    config = json.loads(file.read_text())
    for change, scale in (({"guidance_scale": 1.0}, 1.0), ({"enabled": False}, 1.0), ({}, 6.0)):
        file.write_text(json.dumps(config | change))
        assert read_card(tmp_path).contract.guidance.scale == scale
    file.write_text(json.dumps(config | {"guidance_rescale": 0.7}))
    with pytest.raises(RecipeError, match=r"guidance_rescale: 0\.7 cannot be followed"):
        read_card(tmp_path)


# --- flow schedulers ------------------------------------------------------------------------------------------------------


def test_flow_schedulers_are_followed_or_refused() -> None:
    assert contract_of({"shift": 7.0}, steps=50, scale=1.0) == Contract(steps=50, grid=Shifted(shift=7.0))
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    grid = contract_of(dynamic, steps=50, scale=1.0, tokens=256).grid
    assert isinstance(grid, Shifted) and grid.shift == pytest.approx(math.exp(0.5)) and grid.terminal == 0
    for setting, said in (
        ({"use_karras_sigmas": True}, "use_karras_sigmas: True cannot be followed"),
        (dynamic | {"time_shift_type": "linear"}, "'linear' is not exponential"),
    ):
        with pytest.raises(RecipeError, match=said):
            contract_of(setting, steps=50, scale=1.0, tokens=256)
    with pytest.raises(RecipeError, match="one shift for every size"):
        contract_of(dynamic, steps=50, scale=1.0)
