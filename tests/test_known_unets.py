"""Public few-step weights of U-Nets become students: LCM, Hyper-SD, AnimateDiff-Lightning, AnimateLCM."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core import Rng, Seeds
from fewstep.diffusion import CFG
from fewstep.models import VideoModel
from fewstep.models.known.guidance import features
from fewstep.models.known.importing import Import
from support_known import lora, start_of
from support_unets import IMAGE as UNET
from support_unets import animatediff, awake, stable_diffusion
from tiny_models import TINY, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SIZE = TINY["wan"].size
UNET_LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8),
    "lora_unet_mid_block_resnets_0_time_emb_proj": (16, 32),
}


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layouts of an image model and of a video model, as they are published."""
    home = tmp_path_factory.mktemp("unets")
    stable_diffusion().save_pretrained(home / "sd")
    animatediff().save_pretrained(home / "animatediff")
    return {name: home / name for name in ("sd", "animatediff")}


def image_of(pipe: Any, student: VideoModel, **options: Any) -> Tensor:
    """The pipeline's latents from the student's noise, as a clip of one frame; its noise is that of the student."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(["a b", "c d"], latents=start_of(student)[:, :, 0], output_type="latent", **options)[0]
    return made[:, :, None]


def with_noise_of(pipe: Any) -> None:
    """Let the scheduler draw the student's fresh noise."""
    seeds, step = Seeds((5, 6)), pipe.scheduler.step

    def stepped(output: Tensor, t: Any, x: Tensor, **options: Any) -> Any:
        index = pipe.scheduler.step_index or 0
        noise = seeds.randn((2, x.shape[1], 1, *x.shape[2:]), f"renoise/{index}")[:, :, 0]
        with patch("diffusers.schedulers.scheduling_lcm.randn_tensor", return_value=noise):
            return step(output, t, x, **options)

    pipe.scheduler.step = stepped


@torch.no_grad()
def test_lcm_lora_is_what_diffusers_makes_of_it(unets: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "lcm-lora-sdv1-5").mkdir()
    file = tmp_path / "lcm-lora-sdv1-5" / "pytorch_lora_weights.safetensors"
    lora(file, UNET_LAYERS, seed=1)
    student = Import(source=str(file), base=str(unets["sd"])).student()
    assert student.card.name == "lcm-lora-sd15" and not student.card.contract.guidance.active
    pipe = StableDiffusionPipeline.from_pretrained(unets["sd"])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(file))
    with_noise_of(pipe)
    theirs = image_of(pipe, student, num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(student.latents(["a b", "c d"], seed=(5, 6)), theirs, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_network_that_is_told_its_guidance_is_told_it_once(unets: dict[str, Path], tmp_path: Path) -> None:
    """LCM: the features of w = 7.5 are diffusers' own, and a bias in their place computes the same."""
    told = awake(UNet2DConditionModel(**UNET, time_cond_proj_dim=16), seed=4)
    (tmp_path / "LCM_Dreamshaper_v7").mkdir()
    told.save_pretrained(tmp_path / "LCM_Dreamshaper_v7" / "unet")
    student = Import(source=str(tmp_path / "LCM_Dreamshaper_v7"), base=str(unets["sd"])).student()
    pipe = StableDiffusionPipeline.from_pretrained(unets["sd"], unet=told)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe.get_guidance_scale_embedding(torch.tensor([7.5]), embedding_dim=16)[0]
    torch.testing.assert_close(features(8.5, 16), theirs)
    x, cond = start_of(student), student.encode_text(["a b", "c d"], guided=False)[0]
    made = told(x[:, :, 0], torch.tensor(759.0), cond.text, timestep_cond=theirs.expand(2, -1))[0]
    torch.testing.assert_close(
        student.denoiser(x, torch.full((2,), 0.76), cond).raw[:, :, 0], made, atol=1e-5, rtol=1e-5
    )
    with_noise_of(pipe)
    theirs = image_of(pipe, student, num_inference_steps=4, guidance_scale=8.5)
    torch.testing.assert_close(student.latents(["a b", "c d"], seed=(5, 6)), theirs, atol=1e-3, rtol=1e-3)
    assert student.card.provenance["guidance input"] == "8.5" and not student.card.contract.guidance.active


def test_such_a_network_is_no_plain_one(unets: dict[str, Path], tmp_path: Path) -> None:
    """It was read before as if it were told nothing."""
    told = UNet2DConditionModel(**UNET, time_cond_proj_dim=16)
    pipe = StableDiffusionPipeline.from_pretrained(unets["sd"], unet=told)
    pipe.save_pretrained(tmp_path / "told")
    with pytest.raises(ValueError, match="time_cond_proj_dim: 16.*fewstep import"):
        VideoModel.from_pretrained(tmp_path / "told")
    plain = UNet2DConditionModel(**UNET)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is not told its guidance"):
        Import(source=str(tmp_path / "plain"), system="lcm-dreamshaper", base=str(unets["sd"])).student()


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 4])
def test_hyper_sd_ends_where_its_base_does(unets: dict[str, Path], steps: int, tmp_path: Path) -> None:
    """At the first level of the table: DDIM of diffusers with `set_alpha_to_one: false`, trailing."""
    file = tmp_path / f"Hyper-SD15-{steps}steps-lora.safetensors"
    lora(file, UNET_LAYERS, seed=1)
    student = Import(source=str(file), base=str(unets["sd"])).student()
    assert student.card.contract.counts == (steps,) and student.card.contract.times()[-1] == 0.001
    pipe = StableDiffusionPipeline.from_pretrained(unets["sd"])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.load_lora_weights(str(file))
    theirs = image_of(pipe, student, num_inference_steps=steps, guidance_scale=0)
    torch.testing.assert_close(student.latents(["a b", "c d"], seed=(5, 6)), theirs, atol=1e-3, rtol=1e-3)


def motion_file(path: Path, folder: Path, strength: float = 0.05) -> dict[str, Tensor]:
    """Motion modules as they are published, other ones than those of the `folder`."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = {
        name: value + strength * Rng(9).randn(tuple(value.shape), name) if ".pe" not in name else value
        for name, value in unet.items()
        if ".motion_modules." in name
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return tensors


@torch.no_grad()
def test_lightning_replaces_the_motion_modules(unets: dict[str, Path], tmp_path: Path) -> None:
    """And nothing else. Diffusers' pipeline with the recommended scheduler makes the same clip, from its own first noise."""
    file = tmp_path / "animatediff_lightning_4step_diffusers.safetensors"
    tensors = motion_file(file, unets["animatediff"])
    student = Import(source=str(file), base=str(unets["animatediff"]), num_frames=4).student()
    assert student.card.contract.trained == {4: (1.0, 0.75, 0.5, 0.25, 0.0)}
    base = VideoModel.from_pretrained(unets["animatediff"]).denoiser.backbone
    before = base.state_dict()
    for name, value in student.denoiser.backbone.state_dict().items():
        other = base.foreign(name)
        assert torch.equal(value, tensors[other] if other in tensors else before[name])
    pipe = AnimateDiffPipeline.from_pretrained(unets["animatediff"])
    pipe.unet.load_state_dict(tensors, strict=False)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", beta_schedule="linear"
    )
    pipe.set_progress_bar_config(disable=True)
    x, sigma = start_of(student)[:1], 1 / pipe.scheduler.init_noise_sigma
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    pure = x * (1 + float(sigma) ** 2) ** 0.5  # diffusers begins with a little less than pure noise
    theirs = pipe("a b", num_frames=4, latents=pure, **options).frames
    torch.testing.assert_close(student.latents(["a b"], seed=5), theirs, atol=1e-3, rtol=1e-3)


def test_a_file_for_another_step_count_is_not_confused(unets: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "animatediff_lightning_8step_diffusers.safetensors"
    motion_file(file, unets["animatediff"])
    base = {"base": str(unets["animatediff"]), "num_frames": 4}
    assert Import(source=str(file), **base).student().card.contract.counts == (8,)
    with pytest.raises(ValueError, match="is sampled in 1 or 2 or 4 or 8 steps, not in 4, and 'animatediff.* is for 8"):
        Import(source=str(file), steps=4, **base).student()
    renamed = file.rename(tmp_path / "lightning.safetensors")
    with pytest.raises(ValueError, match="does not say which; give --steps N"):
        Import(source=str(renamed), system="animatediff-lightning", **base).student()
    assert Import(
        source=str(renamed), system="animatediff-lightning", steps=2, **base
    ).student().card.contract.counts == (2,)
    with pytest.raises(ValueError, match="not in 3"):
        Import(source=str(renamed), system="animatediff-lightning", steps=3, **base).student()


def test_animatelcm_is_motion_modules_and_a_lora(unets: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "AnimateLCM"
    tensors = motion_file(folder / "diffusion_pytorch_model.safetensors", unets["animatediff"])
    updates = lora(folder / "AnimateLCM_sd15_t2v_lora.safetensors", dict([next(iter(UNET_LAYERS.items()))]), seed=1)
    student = Import(source=str(folder), base=str(unets["animatediff"]), num_frames=4).student()
    base = VideoModel.from_pretrained(unets["animatediff"]).denoiser.backbone
    before = base.state_dict()
    added = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    for name, value in student.denoiser.backbone.state_dict().items():
        other = base.foreign(name)
        expected = tensors[other] if other in tensors else before[name]
        torch.testing.assert_close(value, expected + next(iter(updates.values())) if other == added else expected)
    assert student.card.contract.guidance == CFG(scale=1.5) and student.card.contract.steps == 6
    chain = {key: value for key, value in student.card.provenance.items() if key.endswith("licence")}
    assert chain.pop("licence") == "MIT" and "OpenRAIL" in chain.pop("teacher.licence")
    assert chain == {"fact: licence": "github.com/G-U-N/AnimateLCM LICENSE.txt"}


def test_another_table_is_refused(unets: dict[str, Path], tmp_path: Path) -> None:
    """Motion modules were trained on the linear table, and students of eps predict no v."""
    animatediff(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scaled")
    file = tmp_path / "animatediff_lightning_4step_diffusers.safetensors"
    motion_file(file, tmp_path / "scaled")
    with pytest.raises(ValueError, match="was trained for eps on Betas.*linear.*scheduler that it was trained with"):
        Import(source=str(file), base=str(tmp_path / "scaled"), num_frames=4).student()
    stable_diffusion(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    lora(tmp_path / "Hyper-SD15-4steps-lora.safetensors", UNET_LAYERS, seed=1)
    with pytest.raises(ValueError, match="predicts v on .* was trained for eps"):
        Import(source=str(tmp_path / "Hyper-SD15-4steps-lora.safetensors"), base=str(tmp_path / "v")).student()


def test_a_base_of_another_family_is_refused(unets: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "Hyper-SD15-4steps-lora.safetensors"
    lora(file, UNET_LAYERS, seed=1)
    with pytest.raises(
        ValueError, match="is a Wan, and hyper-sd15 belongs to a StableDiffusion; give --base, for example stable"
    ):
        Import(source=str(file), base=str(shared("wan")), **SIZE).student()
    with pytest.raises(ValueError, match="animatediff-lightning needs a base; give --base FOLDER"):
        Import(source=str(file), system="animatediff-lightning", steps=4).student()
    with pytest.raises(
        FileNotFoundError, match="no such file or folder; download the files of lightx2v/Wan2.2-Lightning"
    ):
        Import(source="lightx2v/Wan2.2-Lightning", base=str(shared("wan_experts"))).student()
