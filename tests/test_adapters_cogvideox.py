"""CogVideoX in three parts: equal to diffusers' own forward and to its DDIM, with both kinds of positions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from fewstep.core import Call, Cond, KVView, RecipeError, Rng, Seeds
from fewstep.core.call import Causal
from fewstep.diffusion import DDIM, Betas, Contract
from fewstep.evaluate.conformance import check_model, subject
from fewstep.models import Denoiser, Lora, VideoModel
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.adapters.dits.cogvideox import CogVideoX
from fewstep.models.lora import adapt, adapters
from fewstep.models.source import Diffusers
from support_unets import awake
from tiny_models import COGVIDEOX_IMAGE, COGVIDEOX_IMAGE_SIZE, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks in the rain"]
SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
ROTARY = SMALL | {"use_rotary_positional_embeddings": True}
MODELS = {
    "2b": SMALL, "5b": ROTARY, "1.5": ROTARY | {"patch_size_t": 2, "patch_bias": False},
    "image": ROTARY | {"in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5 image": ROTARY | {"in_channels": 8, "patch_size_t": 2, "ofs_embed_dim": 8},
}  # fmt: skip
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)

NO_PAST = Call(kv=KVView((), torch.empty(0, dtype=torch.long), torch.zeros((), dtype=torch.long)))


def network(config: dict[str, Any]) -> CogVideoX:
    torch.manual_seed(0)
    made: CogVideoX = awake(CogVideoX(config=config))
    for buffer in made.buffers():
        buffer.normal_()
    return made


def inputs(frames: int = 3, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    image = {"image_latents": torch.randn(2, 4, frames, height, width)}
    cond = Cond(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool), image)
    return torch.randn(2, 4, frames, height, width), torch.tensor([1.0, 0.251]), cond


@every_model
@pytest.mark.parametrize("size", [(3, 8, 12), (1, 8, 12), (4, 6, 4)], ids=str)
@torch.no_grad()
def test_forward_is_that_of_diffusers(config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """Bit for bit, at the trained size and others."""
    frames, *space = size
    if "patch_size_t" in config:
        frames += frames % 2
    if "use_learned_positional_embeddings" in config:
        space = [8, 12]
    mine, (x, t, cond) = network(config), inputs(frames, *space)
    assert torch.equal(mine(x, t, cond).raw, mine.original().forward(x, t, cond))
    changed = Cond(cond.text, cond.mask, {"image_latents": cond.extra["image_latents"] + 1})
    assert torch.equal(mine(x, t, changed).raw, mine(x, t, cond).raw) == (config.get("in_channels") == 4)


@torch.no_grad()
def test_ddim_is_that_of_cogvideox() -> None:
    """v-prediction from pure noise at t = 1: a table without zero SNR, or with another shift, would be visible."""
    theirs = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    mine = network(MODELS["2b"])
    denoiser = Denoiser(mine, path_of(theirs.config), kind_of(theirs.config))
    assert denoiser.path == Betas(zero_snr=True, snr_shift=3.0) and denoiser.kind == "v"
    x, _, cond = inputs()
    whole = mine.original().networks["transformer"]
    theirs.set_timesteps(5)
    expected = x
    for k in theirs.timesteps:
        made = whole(expected.transpose(1, 2), cond.text, k.expand(2)).sample.transpose(1, 2)
        expected = theirs.step(made, k, expected).prev_sample

    def sample(path: Betas, contract: Contract) -> Tensor:
        student = Denoiser(mine, path, "v")
        return DDIM()(lambda x, t, call: student(x, t, cond, call), path.prior(x), contract.times(), rng=Rng(0))

    contract = contract_of(theirs.config, steps=5, scale=6.0)
    torch.testing.assert_close(sample(denoiser.path, contract), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(Betas(), contract), expected, atol=1e-2)


def test_what_cogvideox_cannot_do_is_refused() -> None:
    mine, (x, t, cond) = network(MODELS["5b"]), inputs()
    with pytest.raises(ValueError, match="one time per clip"):
        mine(x, Rng(0).rand((2, 3), "t"), cond)
    with pytest.raises(ValueError, match="no cache"):
        mine(x, t, cond, NO_PAST)
    with pytest.raises(ValueError, match="not chunks; call it without causal"):
        mine(x, t, cond, Call(causal=Causal((1, 2))))
    with pytest.raises(ValueError, match="multiples of 2"):
        mine(x[..., :5], t, cond)
    with pytest.raises(ValueError, match="F a multiple of 2"):
        network(MODELS["1.5"])(x, t, cond)
    with pytest.raises(ValueError, match="knows positions of 4 x 6 patches, not 5 x 6"):
        network(MODELS["1.5"])(torch.zeros(2, 4, 2, 10, 12), t, cond)
    with pytest.raises(ValueError, match="learned positions of 4 x 6 patches and no others, not of 3 x 6"):
        network(MODELS["image"])(*inputs(3, 6, 12))
    with pytest.raises(ValueError, match="is an image-to-video network, and the condition has no image_latents"):
        network(MODELS["image"])(x, t, Cond(cond.text, cond.mask))
    with pytest.raises(ValueError, match="trained without dropout; set dropout: 0"):
        CogVideoX(config=SMALL | {"dropout": 0.1})


# --- images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(COGVIDEOX_IMAGE))
def folder(request: pytest.FixtureRequest) -> Path:
    return shared(request.param)


@pytest.fixture
def model(folder: Path) -> VideoModel:
    return Diffusers(source=str(folder), text_dtype="float32", **COGVIDEOX_IMAGE_SIZE).load()


def pictures() -> Tensor:
    return 2 * Rng(0).rand((2, 3, 64, 80), "pictures") - 1


@torch.no_grad()
def test_clips_of_an_image_are_the_pipeline_s(folder: Path, model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same images, latents and prompts: same latents and frames out. The pipeline draws image latents from the posterior,
    whose mode it is given here."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    options = {
        "image": pictures() / 2 + 0.5, "prompt": PROMPTS, "negative_prompt": model.card.negative_prompt,
        "num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise.transpose(1, 2), "max_sequence_length": 16,
        **COGVIDEOX_IMAGE_SIZE,
    }  # fmt: skip
    made = {"image": pictures(), "seed": (5, 6), "guidance_scale": 5.0, "num_inference_steps": 4}
    theirs = pipeline(**options, output_type="latent").frames.transpose(1, 2)
    ours = model.latents(PROMPTS, **made)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    swapped = model.latents(PROMPTS, **made | {"image": pictures().flip(0)})
    assert (swapped - ours).abs().amax((1, 2, 3, 4)).min() > 1e-3
    frames = torch.as_tensor(pipeline(**options, output_type="np").frames).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close((model(PROMPTS, **made) + 1) / 2, frames, atol=1e-4, rtol=1e-4)


def test_models_of_images_pass_the_checks(model: VideoModel) -> None:
    found = check_model(model)
    assert not found.failed
    passed = {finding.name for finding in found.findings if finding.outcome == "pass"}
    assert passed >= {"forward", "weights", "times", "saved", "batch", "guidance", "checkpointing", "jvp"}


def test_a_student_of_images_comes_back(folder: Path, model: VideoModel, tmp_path: Path) -> None:
    """Its image part has no weights, and is named in the card. LoRA finds every linear layer of the blocks."""
    twin = adapt(model.denoiser, Lora(rank=2, alpha=2.0), Rng(0))
    linear = {n for n, m in model.denoiser.named_modules() if ".blocks." in n and isinstance(m, torch.nn.Linear)}
    assert adapters(twin).keys() == linear
    saved = model.with_part("denoiser", copy.deepcopy(model.denoiser), role="student").save(tmp_path)
    assert sorted(path.name for path in saved.iterdir()) == ["card.json", "denoiser.safetensors"]
    options = {"image": pictures()[0], "num_inference_steps": 2}
    assert torch.equal(*(m(PROMPTS[:1], **options) for m in (VideoModel.from_pretrained(saved), model)))


def test_a_size_without_positions_is_refused_before_weights_are_read(folder: Path) -> None:
    """Learned positions are for one size; the others for all up to the largest."""
    learned = folder.name.startswith("cogvideox_image")
    sizes = {"num_frames": 9, "height": 64 if learned else 128, "width": 64}
    with pytest.raises(RecipeError, match="keep the height" if learned else "give a smaller height"):
        Diffusers(source=str(folder), **sizes).card()


def test_the_checks_keep_the_only_size_there_is(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clip is too large to be checked as it is."""
    monkeypatch.setattr(subject, "_SMALL", 10)
    monkeypatch.setattr(subject, "_LATENT_SIZE", (4, 4))
    found = check_model(model, only=["forward"])
    assert not found.failed and found.latents[2:] == ((4, 4) if model.denoiser.backbone.any_size else (8, 10))
