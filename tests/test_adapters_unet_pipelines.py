"""Whole models around U-Nets: the same clips as diffusers' own schedulers and pipelines make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from bench_unets import animatediff, scheduler, stable_diffusion
from fewstep.core import Cond, RecipeError, Rng
from fewstep.diffusion import CFG, Betas, Contract, Prediction, Timesteps, solve
from fewstep.models import Denoiser
from fewstep.models.adapters.animatediff import AnimateDiff
from fewstep.models.adapters.clip import ClipText
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.adapters.frame_codec import FrameCodec
from fewstep.models.adapters.stable_diffusion import StableDiffusion
from fewstep.models.adapters.unet import UNet

PROMPTS = ["a red cat 1", "two dogs"]


def held(family: type[UNet], theirs: nn.Module) -> UNet:
    """An adapter with the weights of a network of diffusers."""
    mine, weights = family(config=dict(theirs.config)).eval(), theirs.state_dict()
    mine.load_state_dict({name: weights[mine.foreign(name)] for name in mine.state_dict()})
    return mine


def text_of(pipeline: Any) -> ClipText:
    text = ClipText(config=pipeline.text_encoder.config.to_dict())
    text.encoder, text.tokenizer = pipeline.text_encoder, pipeline.tokenizer
    return text


def sample(network: Denoiser, contract: Contract, start: Tensor, cond: Cond, uncond: Cond) -> Tensor:
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        return contract.guidance(network, x, t, cond, uncond)

    with torch.no_grad():
        return solve(contract.solver, denoise, network.path.prior(start), contract.times(), rng=Rng(0))


# --- schedulers -------------------------------------------------------------------------------------------------------

LOOPS = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("settings", LOOPS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("steps", [1, 4, 10])
@torch.no_grad()
def test_ddim_is_that_of_diffusers(settings: dict[str, Any], steps: int) -> None:
    """A start, an end or a level that is off by one would be visible after few steps."""
    torch.manual_seed(0)
    theirs, pipeline = scheduler("linear", **settings), animatediff()
    network = Denoiser(held(AnimateDiff, pipeline.unet), path_of(theirs.config), kind_of(theirs.config))
    text, start = torch.randn(2, 2, 5, 12), torch.randn(2, 4, 3, 8, 8)
    cond, uncond = (Cond(states, torch.ones(2, 5, dtype=torch.bool)) for states in text)
    theirs.set_timesteps(steps)
    x = start
    for timestep in theirs.timesteps:
        raw = [pipeline.unet(x, timestep, states.repeat_interleave(3, 0)).sample for states in (cond.text, uncond.text)]
        x = theirs.step(raw[1] + 3.0 * (raw[0] - raw[1]), timestep, x).prev_sample
    made = sample(network, contract_of(theirs.config, steps=steps, scale=3.0), start, cond, uncond)
    torch.testing.assert_close(made, x, atol=2e-4, rtol=2e-4)
    wrong = sample(network, Contract(solver="ddim", steps=steps, guidance=CFG(scale=3.0)), start, cond, uncond)
    if settings["timestep_spacing"] == "leading":
        assert not torch.allclose(wrong, x, atol=1e-2)


def test_schedulers_that_cannot_be_read_are_refused() -> None:
    config = dict(scheduler("linear").config)
    assert path_of(config) == Betas(schedule="linear")
    assert contract_of(config, steps=25, scale=7.5).timesteps == Timesteps(
        spacing="leading", steps_offset=1, ends_clean=False
    )
    for key, value in (("beta_schedule", "squaredcos_cap_v2"), ("clip_sample", True), ("trained_betas", [0.1])):
        with pytest.raises(RecipeError, match=key):
            path_of(config | {key: value})
    with pytest.raises(RecipeError, match="prediction_type"):
        kind_of(config | {"prediction_type": "flow"})


# --- pipelines --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_animatediff_makes_the_clips_of_its_pipeline() -> None:
    pipeline, start = animatediff(), torch.randn(2, 4, 4, 8, 8)
    expected = pipeline(
        PROMPTS, num_frames=4, height=16, width=16, num_inference_steps=5, guidance_scale=7.5, latents=start,
        output_type="pt",
    ).frames  # fmt: skip
    config, text = pipeline.scheduler.config, text_of(pipeline)
    network = Denoiser(held(AnimateDiff, pipeline.unet), path_of(config), kind_of(config))
    cond, uncond = text.encode(PROMPTS), text.encode(["", ""])
    latents = sample(network, contract_of(config, steps=5, scale=7.5), start, cond, uncond)
    codec = FrameCodec(config=dict(pipeline.vae.config))
    codec.load_state_dict({f"vae.{name}": value for name, value in pipeline.vae.state_dict().items()})
    frames = codec.decode(latents).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(frames.transpose(1, 2), expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_stable_diffusion_makes_the_images_of_its_pipeline() -> None:
    """A clip of two frames is two images under one prompt."""
    pipeline, start = stable_diffusion(), torch.randn(1, 4, 2, 8, 8)
    config, text = pipeline.scheduler.config, text_of(pipeline)
    network = Denoiser(held(StableDiffusion, pipeline.unet), path_of(config), kind_of(config))
    cond, uncond = text.encode(PROMPTS[:1]), text.encode([""])
    latents = sample(network, contract_of(config, steps=5, scale=7.5), start, cond, uncond)
    for frame in range(2):
        expected = pipeline(
            PROMPTS[0], height=16, width=16, num_inference_steps=5, guidance_scale=7.5, latents=start[:, :, frame],
            output_type="latent",
        ).images  # fmt: skip
        torch.testing.assert_close(latents[:, :, frame], expected, atol=2e-4, rtol=2e-4)


# --- text and codec ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_states_are_those_of_the_pipeline() -> None:
    pipeline = stable_diffusion()
    text, prompts = text_of(pipeline), [*PROMPTS, "", "x" * 200]
    given, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    cond = text.encode(prompts)
    torch.testing.assert_close(cond.text, given, atol=1e-6, rtol=0)
    torch.testing.assert_close(text.encode([""]).expand(4).text, empty, atol=1e-6, rtol=0)
    assert cond.text.shape == (4, text.length, text.width) == (4, 77, 12)
    assert cond.mask.all()
    assert text.blank(3).text.shape == (3, 77, 12)


@torch.no_grad()
def test_the_codec_is_that_of_the_pipeline_whatever_the_chunk() -> None:
    theirs = animatediff().vae
    codecs = [FrameCodec(config=dict(theirs.config), chunk=chunk) for chunk in (16, 3)]
    for codec in codecs:
        codec.vae = theirs
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 4, 16, 24) * 2 - 1
    latents = codecs[0].encode(frames)
    assert latents.shape == (2, *codecs[0].latent_shape(4, 16, 24)) == (2, 4, 4, 8, 12)
    torch.testing.assert_close(latents[1, :, 2], 0.18215 * theirs.encode(frames[1:, :, 2]).latent_dist.mode()[0])
    decoded = codecs[0].decode(latents)
    torch.testing.assert_close(decoded[0, :, 3], theirs.decode(latents[:1, :, 3] / 0.18215).sample[0])
    torch.testing.assert_close(codecs[1].decode(latents), decoded)
    with pytest.raises(ValueError, match="multiples of 2"):
        codecs[0].encode(frames[..., :23])
