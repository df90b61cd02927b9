"""The Wan family beyond one text-to-video network: experts by time, and images that a clip begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")


from fewstep.attention import KVCache
from fewstep.core import Cond, Rng, Seeds
from fewstep.core.build import RecipeError
from fewstep.diffusion import CFG, Prediction, RectifiedFlow
from fewstep.models import VideoModel
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.pipeline import sample
from fewstep.models.bundle import read_card
from fewstep.models.source import Diffusers
from tiny_models import TINY, save_tiny

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks in the rain"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("wan_experts", tmp_path_factory.mktemp("experts"))


def loaded(folder: Path, name: str) -> VideoModel:
    return Diffusers(source=str(folder), text_dtype="float32", **TINY[name].size).load()


# --- experts --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_sample_goes_to_the_expert_of_its_time(experts: Path) -> None:
    model = loaded(experts, "wan_experts")
    backbone = model.denoiser.backbone
    x, t = Rng(0).randn((4, *model.latent_shape()), "x"), torch.tensor([0.2, 0.875, 0.874, 1.0])
    cond = model.text.encode([PROMPTS[0]] * 4)
    made = backbone(x, t, cond).raw
    for row, index in enumerate((1, 0, 1, 0)):
        one = slice(row, row + 1)
        assert torch.allclose(made[one], backbone.expert(index)(x[one], t[one], cond[one]).raw, atol=1e-6)
    assert torch.equal(backbone(x[1::2], t[1::2], cond[1::2]).raw, backbone.expert(0)(x[1::2], t[1::2], cond[1::2]).raw)
    features = model.denoiser.features(x, t, cond, [0])[0]
    assert torch.allclose(features[3:], model.denoiser.features(x[3:], t[3:], cond[3:], [0])[0], atol=1e-6)


def test_an_idle_expert_has_a_gradient_of_zero(experts: Path) -> None:
    """Or processes that drew other times would add up gradients of other parameters."""
    model = loaded(experts, "wan_experts")
    x, cond = Rng(0).randn((1, *model.latent_shape()), "x"), model.text.encode(PROMPTS[:1])
    for t, idle in ((0.95, 1), (0.2, 0)):
        model.denoiser.zero_grad()
        model.denoiser(x, torch.tensor([t]), cond).raw.square().mean().backward()
        gradients = {name: p.grad for name, p in model.denoiser.named_parameters()}
        assert all(g is not None for g in gradients.values())
        alive = {name for name, g in gradients.items() if g.any()}
        assert alive and not any(f"experts.{idle}." in name for name in alive)


@torch.no_grad()
def test_the_scale_of_each_expert_is_the_pipeline_s(experts: Path) -> None:
    model, layout = loaded(experts, "wan_experts"), Layout.find(str(experts))
    cond, uncond = model.encode_text(PROMPTS[:1])
    noise = Seeds((3,)).randn((1, *model.latent_shape()), "start")
    theirs = sample(model, layout, noise, cond, uncond, 4)
    torch.testing.assert_close(model.latents(PROMPTS[:1], num_inference_steps=4, seed=3), theirs, atol=1e-4, rtol=1e-4)
    one_scale = model.latents(PROMPTS[:1], num_inference_steps=4, seed=3, guidance_scale=4.0)
    assert (one_scale - theirs).abs().max() > 1e-3


def test_what_experts_cannot_do_is_refused(experts: Path, tmp_path: Path) -> None:
    model = loaded(experts, "wan_experts")
    x, cond = Rng(0).randn((1, *model.latent_shape()), "x"), model.text.encode(PROMPTS[:1])
    with pytest.raises(ValueError, match="the frames of a clip must have times of one expert"):
        model.denoiser(x, torch.tensor([[0.9, 0.2]]), cond)
    assert model.denoiser(x, torch.tensor([[0.5, 0.2]]), cond).raw.isfinite().all()
    with pytest.raises(ValueError, match="experts have no cache"):
        model.denoiser(x, torch.tensor([0.2]), cond, KVCache.empty().view())
    save_tiny("wan_experts", tmp_path)
    config = tmp_path / "transformer_2" / "config.json"
    config.write_text(config.read_text().replace('"ffn_dim": 32', '"ffn_dim": 64'))
    with pytest.raises(RecipeError, match="differ in more than their weights"):
        read_card(tmp_path)


def test_guidance_has_a_scale_for_the_other_times() -> None:
    guidance, t = CFG(scale=4.0, low=0.5, outside=3.0), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def net(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> Prediction:
        return Prediction(cond.text[:, :, None, None, None].expand_as(x), "flow", x, t, RectifiedFlow())

    x, mask = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool)
    cond, uncond = Cond(torch.full((3, 1), 2.0).double(), mask), Cond(torch.ones(3, 1).double(), mask)
    assert guidance(net, x, t, cond, uncond).raw.flatten().tolist() == [4.0, 5.0, 5.0]
    assert guidance.rescaled(2.0) == CFG(scale=2.0, low=0.5, outside=2.0) and CFG(outside=2.0).active
    assert CFG(scale=3.0, low=0.5).rescaled(2.0) == CFG(scale=2.0, low=0.5)
