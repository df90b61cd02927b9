"""Whole models around U-Nets: the same clips as diffusers' own schedulers and pipelines make, and runs that start from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from fewstep.attention import BlockCausal
from fewstep.cli import main
from fewstep.core import Batch, Call, Cond, RecipeError, Rng, Seeds
from fewstep.diffusion import CFG, DDIM, Betas, Contract, Prediction, Timesteps
from fewstep.engine.nets import build_nets
from fewstep.methods import DMD2, Adversary, BackwardSimulation
from fewstep.models import Denoiser, VideoModel
from fewstep.models.adapters.codecs.frame_codec import FrameCodec
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.bundle import read_card
from fewstep.models.source import Diffusers
from support_unets import animatediff, scheduler, stable_diffusion

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
MAKE = {"animatediff": animatediff, "stable_diffusion": stable_diffusion}
PROMPTS = ["a red cat 1", "two dogs"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Every pipeline, and the folder it was saved to."""
    made = {}
    for name, make in MAKE.items():
        folder = tmp_path_factory.mktemp(name)
        pipeline = make()
        pipeline.save_pretrained(folder)
        made[name] = pipeline, folder
    return made


@pytest.fixture(params=list(MAKE))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(pipelines: dict[str, tuple[Any, Path]], name: str) -> Any:
    return pipelines[name][0]


@pytest.fixture
def folder(pipelines: dict[str, tuple[Any, Path]], name: str) -> Path:
    return pipelines[name][1]


@pytest.fixture
def model(folder: Path) -> VideoModel:
    return VideoModel.from_pretrained(folder)


# --- schedulers -----------------------------------------------------------------------------------------------------------

LOOPS = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("settings", LOOPS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 5])  # five have the same start and end
@torch.no_grad()
def test_ddim_is_that_of_diffusers(
    pipelines: dict[str, tuple[Any, Path]], settings: dict[str, Any], steps: int
) -> None:
    """A start, an end or a level that is off by one would be visible after few steps."""
    torch.manual_seed(0)
    theirs, (pipeline, folder) = scheduler("linear", **settings), pipelines["animatediff"]
    backbone = VideoModel.from_pretrained(folder).denoiser.backbone
    network = Denoiser(backbone, path_of(theirs.config), kind_of(theirs.config))
    text, start = torch.randn(2, 2, 5, 12), torch.randn(2, 4, 3, 8, 8)
    cond, uncond = (Cond(states, torch.ones(2, 5, dtype=torch.bool)) for states in text)
    theirs.set_timesteps(steps)
    x = start
    for timestep in theirs.timesteps:
        raw = [pipeline.unet(x, timestep, states.repeat_interleave(3, 0)).sample for states in (cond.text, uncond.text)]
        x = theirs.step(raw[1] + 3.0 * (raw[0] - raw[1]), timestep, x).prev_sample

    def sample(contract: Contract) -> Tensor:
        def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
            return contract.guidance(network, x, t, cond, uncond, call)

        return contract.sampler(denoise, network.path.prior(start), contract.times(), rng=Rng(0))

    torch.testing.assert_close(sample(contract_of(theirs.config, steps=steps, scale=3.0)), x, atol=2e-4, rtol=2e-4)
    if settings["timestep_spacing"] == "leading":
        wrong = sample(Contract(sampler=DDIM(), steps=steps, guidance=CFG(scale=3.0)))
        assert not torch.allclose(wrong, x, atol=1e-2)


def test_schedulers_that_cannot_be_read_are_refused() -> None:
    config = dict(scheduler("linear").config)
    assert path_of(config) == Betas(schedule="linear")
    assert contract_of(config, steps=25, scale=7.5).grid == Timesteps(
        spacing="leading", steps_offset=1, ends_clean=False
    )
    for key, value in (("beta_schedule", "squaredcos_cap_v2"), ("clip_sample", True), ("trained_betas", [0.1])):
        with pytest.raises(RecipeError, match=key):
            path_of(config | {key: value})
    with pytest.raises(RecipeError, match="prediction_type"):
        kind_of(config | {"prediction_type": "flow"})


# --- pipelines ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clips_are_the_pipeline_s(pipelines: dict[str, tuple[Any, Path]]) -> None:
    """From prompts to frames: text states, guidance, times, sampler and codec, all by the card."""
    pipeline, folder = pipelines["animatediff"]
    model = Diffusers(source=str(folder), num_frames=4).load()
    start = Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    expected = pipeline(
        PROMPTS, num_frames=4, height=16, width=16, num_inference_steps=5, guidance_scale=7.5, latents=start,
        output_type="pt",
    ).frames  # fmt: skip
    made = model(PROMPTS, seed=(5, 6), num_inference_steps=5) / 2 + 0.5
    torch.testing.assert_close(made.transpose(1, 2), expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_images_are_the_pipeline_s(pipelines: dict[str, tuple[Any, Path]]) -> None:
    """An image is a clip of one frame; in a clip of two, each frame is the image of its own noise."""
    pipeline, folder = pipelines["stable_diffusion"]
    for frames in (1, 2):
        model = Diffusers(source=str(folder), num_frames=frames).load()
        start = Seeds((7,)).randn((1, *model.latent_shape()), "start")
        made = model.latents(PROMPTS[:1], seed=7, num_inference_steps=5)
        for frame in range(frames):
            expected = pipeline(
                PROMPTS[0], height=16, width=16, num_inference_steps=5, guidance_scale=7.5,
                latents=start[:, :, frame], output_type="latent",
            ).images  # fmt: skip
            torch.testing.assert_close(made[:, :, frame], expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_text_states_are_those_of_the_pipeline(model: VideoModel, pipeline: Any) -> None:
    prompts = [*PROMPTS, "", "x" * 200]
    given, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    cond, uncond = model.encode_text(prompts)
    torch.testing.assert_close(cond.text, given, atol=1e-6, rtol=0)
    torch.testing.assert_close(uncond.text, empty, atol=1e-6, rtol=0)
    assert cond.text.shape == (4, model.text.length, model.text.width) == (4, 77, 12)
    assert cond.mask.all()
    assert model.text.blank(3).text.shape == (3, 77, 12)


@torch.no_grad()
def test_the_codec_is_that_of_the_pipeline_whatever_the_chunk(pipelines: dict[str, tuple[Any, Path]]) -> None:
    theirs = pipelines["animatediff"][0].vae
    codecs = [FrameCodec(config=dict(theirs.config), chunk=chunk) for chunk in (16, 3)]
    for codec in codecs:
        codec.vae.load_state_dict(theirs.state_dict())
    frames = Rng(0).rand((2, 3, 4, 16, 24), "frames") * 2 - 1
    latents = codecs[0].encode(frames)
    assert latents.shape == (2, *codecs[0].latent_shape(4, 16, 24)) == (2, 4, 4, 8, 12)
    torch.testing.assert_close(latents[1, :, 2], 0.18215 * theirs.encode(frames[1:, :, 2]).latent_dist.mode()[0])
    decoded = codecs[0].decode(latents)
    torch.testing.assert_close(decoded[0, :, 3], theirs.decode(latents[:1, :, 3] / 0.18215).sample[0])
    torch.testing.assert_close(codecs[1].decode(latents), decoded)
    with pytest.raises(ValueError, match="multiples of 2"):
        codecs[0].encode(frames[..., :23])


# --- folders and runs -----------------------------------------------------------------------------------------------------


def test_a_card_says_how_the_model_is_sampled(folder: Path, name: str) -> None:
    card = read_card(folder)
    video = name == "animatediff"
    assert (card.num_frames, card.height, card.width, card.kind) == (8 if video else 1, 16, 16, "eps")
    assert card.path == Betas(schedule="linear" if video else "scaled_linear")
    assert card.contract.guidance == CFG(scale=7.5) and card.contract.times()[-1] == 0.001
    assert card.provenance["licence"] and card.contract.calls() == (50 if video else 100)


def test_a_saved_student_is_the_same_model(model: VideoModel, tmp_path: Path) -> None:
    """The table, the timesteps and diffusers' own configuration survive as JSON."""
    saved = model.save(tmp_path / "student")
    loaded = VideoModel.from_pretrained(saved)
    assert loaded.card.contract == model.card.contract and loaded.card.path == model.card.path
    assert loaded.fingerprint("denoiser") == model.fingerprint("denoiser")
    clips = [m(PROMPTS[:1], num_inference_steps=2) for m in (loaded, model)]
    assert torch.equal(*clips)


def test_weights_may_stay_in_their_files(folder: Path, model: VideoModel) -> None:
    """Under diffusers' names, which are others: every process of a sharded run reads its part from there."""
    left = VideoModel.from_pretrained(folder, leave=("denoiser",))
    assert all(p.is_meta for p in left.denoiser.parameters()) and not next(left.codec.parameters()).is_meta
    assert left.fingerprint("denoiser") == model.fingerprint("denoiser")


def test_what_a_family_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="has no pattern; leave it out"):
        Diffusers(source=str(folder), pattern=BlockCausal(chunk=1)).card()
    with pytest.raises(ValueError, match="multiples of 8, got 12 x 16"):  # 2 pixels per latent, 4 latents per bottom
        Diffusers(source=str(folder), height=12).card()


def test_a_discriminator_reads_several_scales(model: VideoModel) -> None:
    """Frozen features, trained heads; the student's gradient passes through the features."""
    method = DMD2(
        adversary=Adversary(layers=(0, 1, 3)), guidance=CFG(scale=3.0), rollout=BackwardSimulation(grids=((1.0, 0.5),))
    )
    nets, (cond, uncond) = build_nets(model, method, seed=0), model.encode_text(PROMPTS)
    shape = (4, 2, 8, 8)
    batch = Batch(cond=cond, uncond=uncond, latent_shape=shape, x0=Rng(0).randn((2, *shape), "x0"))
    for role, losses in (("discriminator", method.critic_loss), ("student", method.student_loss)):
        nets[role].requires_grad_(True)
        arguments = (0, nets, batch, Rng(1)) if role == "discriminator" else (nets, batch, Rng(1))
        for terms in losses(*arguments):  # type: ignore[operator]
            if any(term.requires_grad for term in terms.values()):
                sum(terms.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None and p.grad.any() for p in nets[role].parameters() if p.ndim > 1)
        nets[role].requires_grad_(False)
    assert all(p.grad is None for role in ("teacher", "critic") for p in nets[role].parameters())
    with pytest.raises(ValueError, match=r"layers must be from -7 to 6, .*; got \[7\]"):
        build_nets(model, DMD2(adversary=Adversary(layers=(7,))), seed=0)


@pytest.mark.parametrize("name", ["stable_diffusion", pytest.param("animatediff", marks=pytest.mark.slow)])
def test_distil_by_command(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned without weights, trained, sampled. What AnimateDiff adds is in the tests above, and takes half a minute here."""
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{type: Diffusers, source: {folder}, num_frames: 2}}\n"
        "method: {type: DMD2, critic_updates: 1, rollout: {type: BackwardSimulation, grids: [[1.0, 0.5]]}}\n"
        f"data: {{type: Prompts, path: {tmp_path / 'prompts.txt'}}}\n"
        "settings: {steps: 1, batch: 1, health: null, parallel: {checkpointing: true}}\n"
    )
    recipe, run = str(tmp_path / "recipe.yaml"), str(tmp_path / "run")
    assert main(["distill", recipe, "--output", run, "--dry-run"]) == 0
    assert "nothing was loaded" in capsys.readouterr().out
    assert main(["distill", recipe, "--output", run, "--quiet"]) == 0
    student = VideoModel.from_pretrained(Path(run) / "student")
    assert student.card.contract.times() == (1.0, 0.5, 0.0) and student(["a red cat"]).shape == (1, 3, 2, 16, 16)
    teacher = VideoModel.from_pretrained(folder)
    assert student.fingerprint("denoiser") != teacher.fingerprint("denoiser")
