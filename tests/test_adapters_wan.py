"""The Wan family beyond one text-to-video network: experts by time, and images that a clip begins with."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")


from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.attention import BlockCausal, KVCache, Window
from fewstep.cli import main
from fewstep.core import Call, Cond, Rng, Seeds
from fewstep.core.build import RecipeError
from fewstep.diffusion import CFG, DDIM, DPMpp2M, Euler, Exact, Prediction, RectifiedFlow, Renoise
from fewstep.evaluate.conformance import check_model
from fewstep.models import VideoModel
from fewstep.models.adapters.dits.wan import Wan
from fewstep.models.adapters.dits.wan_begun import begun
from fewstep.models.adapters.export.pipeline import sample
from fewstep.models.adapters.layout import Layout
from fewstep.models.bundle import read_card
from fewstep.models.source import Diffusers
from tiny_models import IMAGE, IMAGE_SIZE, TINY, save_tiny, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks in the rain"]


@pytest.fixture(scope="module")
def experts() -> Path:
    return shared("wan_experts")


def loaded(folder: Path, name: str) -> VideoModel:
    return Diffusers(source=str(folder), text_dtype="float32", **TINY[name].size).load()


# --- experts --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_sample_goes_to_the_expert_of_its_time(experts: Path) -> None:
    model = loaded(experts, "wan_experts")
    backbone = model.denoiser.backbone
    x, t = Rng(0).randn((4, *model.latent_shape()), "x"), torch.tensor([0.2, 0.6, 0.599, 1.0])
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


@torch.no_grad()
def test_a_frame_is_denoised_by_the_expert_of_its_time(experts: Path) -> None:
    """Which reads the other frames as itself, whatever their times."""
    model = loaded(experts, "wan_experts")
    backbone = model.denoiser.backbone
    x, cond = Rng(0).randn((2, *model.latent_shape()), "x"), model.text.encode(PROMPTS)
    t = torch.tensor([[0.9, 0.2], [0.5, 0.2]])
    both = [backbone.expert(index)(x, t, cond).raw for index in range(2)]
    made = backbone(x, t, cond).raw
    torch.testing.assert_close(made[0, :, 0], both[0][0, :, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made[0, :, 1], both[1][0, :, 1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made[1], both[1][1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_whichever_expert_comes_next_finds_its_own_past(experts: Path) -> None:
    """A clean chunk, made known at time 0, then two steps of the next one, across the boundary."""
    model = Diffusers(
        source=str(experts), text_dtype="float32", pattern=BlockCausal(chunk=1), **TINY["wan_experts"].size
    ).load()
    network, cond = model.denoiser, model.text.encode(PROMPTS)
    x = Rng(0).randn((2, *model.latent_shape()), "x")
    first = network(x[:, :, :1], torch.zeros(2), cond, Call(kv=network.recall(KVCache.empty(), x)))
    memory = KVCache.empty().commit(first.kv or (), 1)
    for t in (0.9, 0.3):
        streamed = network(x[:, :, 1:], torch.full((2,), t), cond, Call(kv=network.recall(memory, x))).raw
        whole = network(x, torch.tensor([[0.0, t]] * 2), cond).raw[:, :, 1:]
        torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)
        one = network.backbone.expert(0 if t > 0.6 else 1)(x[:, :, 1:], torch.full((2,), t), cond).raw
        assert (streamed - one).abs().max() > 1e-3  # the past is read


@torch.no_grad()
@pytest.mark.parametrize("family", ["wan", "wan_experts"])
def test_a_stream_ends_with_the_table_of_positions_unless_frames_move(family: str) -> None:
    """Tiny Wan knows 32 positions (Wan: 1024). A window that moves back to its beginning reads the same."""
    source = str(shared(family))
    model = Diffusers(source=source, text_dtype="float32", pattern=BlockCausal(chunk=1), **TINY[family].size).load()
    network, cond, t = model.denoiser, model.text.encode(PROMPTS), torch.full((2,), 0.9)
    x = Rng(0).randn((2, *model.latent_shape()), "x")[:, :, :1]
    made = {}
    for standing, begin in (("absolute", 0), ("rebased", 31), ("window", 31)):
        memory = replace(KVCache.empty(Window(window=3), 1, standing), start=torch.tensor(begin))
        known = replace(memory, standing="window")
        memory = memory.commit(network(x, 0 * t, cond, Call(kv=network.recall(known, x))).kv or (), 1)
        made[standing] = network(x, t, cond, Call(kv=network.recall(memory, x))).raw
        if begin:
            with pytest.raises(
                ValueError, match=r"knows positions of 32 latent frames, not 33\. Let the stream have a window"
            ):
                network(x, t, cond, Call(kv=network.recall(replace(memory, standing="absolute"), x)))
    for standing in ("rebased", "window"):
        torch.testing.assert_close(made[standing], made["absolute"], atol=1e-5, rtol=1e-5)


def test_experts_must_be_alike(tmp_path: Path) -> None:
    save_tiny("wan_experts", tmp_path)
    config = tmp_path / "transformer_2" / "config.json"
    config.write_text(config.read_text().replace('"ffn_dim": 32', '"ffn_dim": 64'))
    with pytest.raises(RecipeError, match="differ in more than their weights"):
        read_card(tmp_path)


def test_guidance_has_a_scale_for_the_other_times() -> None:
    guidance, t = CFG(scale=4.0, low=0.5, outside=3.0), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def net(x: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return Prediction(cond.text[:, :, None, None, None].expand_as(x), "flow", x, t, RectifiedFlow())

    x, mask = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool)
    cond, uncond = Cond(torch.full((3, 1), 2.0).double(), mask), Cond(torch.ones(3, 1).double(), mask)
    assert guidance(net, x, t, cond, uncond).raw.flatten().tolist() == [4.0, 5.0, 5.0]
    assert guidance.rescaled(2.0) == CFG(scale=2.0, low=0.5, outside=2.0) and CFG(outside=2.0).active
    assert CFG(scale=3.0, low=0.5).rescaled(2.0) == CFG(scale=2.0, low=0.5)


# --- images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(IMAGE))
def folder(request: pytest.FixtureRequest) -> Path:
    return shared(request.param)


@pytest.fixture
def model(folder: Path) -> VideoModel:
    return Diffusers(source=str(folder), text_dtype="float32", **IMAGE_SIZE).load()


def picture(seed: int = 0) -> Image.Image:
    drawn = 255 * Rng(seed).rand((IMAGE_SIZE["height"], IMAGE_SIZE["width"], 3), "picture")
    return Image.fromarray(drawn.to(torch.uint8).numpy())


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def ends(model: VideoModel, first: int, last: int) -> dict[str, torch.Tensor]:
    """What this model begins with, and ends with if it must."""
    given = {"image": pixels(picture(first)), "last_image": pixels(picture(last))}
    return given if model.part("image").needs_last else {"image": given["image"]}


def as_the_pipeline(model: VideoModel, folder: Path, noise: torch.Tensor, **given: Image.Image) -> torch.Tensor:
    """What diffusers makes of two prompts; the model then visits the same times."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if model.part("image").needs_last:  # diffusers takes one clip of two images at a time
        clips = [(PROMPTS[i : i + 1], noise[i : i + 1]) for i in range(len(noise))]
    else:
        clips = [(PROMPTS, noise)]
    made = [
        pipeline(
            prompt=prompts, negative_prompt=model.card.negative_prompt, num_inference_steps=3, guidance_scale=5.0,
            latents=latents, output_type="latent", **given, **IMAGE_SIZE,
        ).frames
        for prompts, latents in clips
    ]  # fmt: skip
    times = tuple(map(float, pipeline.scheduler.sigmas))
    model.card = replace(model.card, contract=replace(model.card.contract, grid=Exact(grids=(times,)), steps=3))
    return torch.cat(made)


@torch.no_grad()
def test_clips_of_an_image_are_the_pipeline_s(folder: Path, model: VideoModel) -> None:
    """Same image, latents, prompts and times: same latents out. Each clip has its own image."""
    noise = Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    given = {name: picture(number) for number, name in enumerate(ends(model, 0, 1))}
    theirs = as_the_pipeline(model, folder, noise, **given)
    ours = model.latents(PROMPTS, **ends(model, 0, 1), seed=(5, 6), guidance_scale=5.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    other = model.latents(PROMPTS, **ends(model, 2, 3), seed=(5, 6), guidance_scale=5.0)
    assert (other - ours).abs().max() > 1e-2
    both = {name: torch.stack([x, ends(model, 2, 3)[name]]) for name, x in ends(model, 0, 1).items()}
    two = model.latents(PROMPTS, **both, seed=(5, 6), guidance_scale=5.0)
    torch.testing.assert_close(two, torch.cat([ours[:1], other[1:]]), atol=1e-4, rtol=1e-4)
    made = model.conditions(PROMPTS, **both)[0].extra
    again = model.latents(PROMPTS, image=made, seed=(5, 6), guidance_scale=5.0)
    assert torch.equal(again, two)


@torch.no_grad()
@pytest.mark.parametrize("folder", ["wan_ends", "wan_image_experts"], indirect=True)
def test_the_last_image_is_read_where_it_can_be(folder: Path, model: VideoModel) -> None:
    noise = Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    theirs = as_the_pipeline(model, folder, noise, image=picture(0), last_image=picture(1))
    images = {"image": pixels(picture(0)), "last_image": pixels(picture(1))}
    ours = model.latents(PROMPTS, **images, seed=(5, 6), guidance_scale=5.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    turned = {"image": images["last_image"], "last_image": images["image"]}
    assert (model.latents(PROMPTS, **turned, seed=(5, 6), guidance_scale=5.0) - ours).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("folder", ["wan_ti2v_image"], indirect=True)
def test_the_first_frame_of_ti2v_is_the_image(model: VideoModel) -> None:
    """In every prediction and at the end of every sampler, and no loss has a gradient there."""
    image = pixels(picture())
    first = model.codec.encode(image[None, :, None])
    x, t = Rng(0).randn((1, *model.latent_shape()), "x"), torch.tensor([0.4])
    cond, _ = model.conditions(PROMPTS[:1], image)
    x0 = model.denoiser(x, t, cond).x0
    torch.testing.assert_close(x0[:, :, :1], first, atol=1e-5, rtol=1e-5)
    assert (x0[:, :, 1:] - first).abs().min() > 0
    other = torch.cat([x[:, :, :1] + 3, x[:, :, 1:]], 2)
    assert torch.equal(model.denoiser(other, t, cond).raw[:, :, 1:], model.denoiser(x, t, cond).raw[:, :, 1:])
    at_zero = model.denoiser(x, torch.zeros(1), cond)
    assert at_zero.raw.isfinite().all() and torch.equal(at_zero.x0, x)
    for sampler in (Euler(), DDIM(), Renoise(), DPMpp2M()):
        model.card = replace(model.card, contract=replace(model.card.contract, sampler=sampler, steps=2))
        torch.testing.assert_close(model.latents(PROMPTS[:1], image=image)[:, :, :1], first, atol=1e-5, rtol=1e-5)


def test_a_given_frame_is_clean_at_time_0_and_its_flow_leads_to_it() -> None:
    x, image, t = Rng(0).randn((2, 4, 3, 2, 2), "x"), Rng(0).randn((2, 4, 1, 2, 2), "image"), torch.tensor([0.5, 1.0])
    for times in (t, t[:, None].expand(2, 3)):
        start, time, flow = begun(x, times, image)
        assert torch.equal(start[:, :, :1], image) and torch.equal(start[:, :, 1:], x[:, :, 1:])
        assert time.tolist() == [[0, 0.5, 0.5], [0, 1, 1]]
        torch.testing.assert_close(x[:, :, :1] - t.reshape(2, 1, 1, 1, 1) * flow, image)


def test_models_of_images_pass_the_checks(model: VideoModel) -> None:
    """Among them: forward, weights and pipeline equal diffusers', saved and loaded, jvp, cached equal to masked."""
    found = check_model(model)
    assert not found.failed
    passed = {finding.name for finding in found.findings if finding.outcome == "pass"}
    assert passed >= {"forward", "weights", "pipeline", "saved", "batch", "checkpointing", "jvp", "full_mask", "cache"}


def test_weights_that_diffusers_leaves_unread_may_be_in_the_files(tmp_path: Path) -> None:
    """Those of the published Wan 2.1 I2V have a `norm_added_q`."""
    file = save_tiny("wan_image", tmp_path) / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    model = Diffusers(source=str(tmp_path), **IMAGE_SIZE).load(leave=("denoiser",))
    assert not next(model.denoiser.parameters()).is_meta
    assert [finding.outcome for finding in check_model(model, only=("weights",)).findings] == ["pass"]
    save_file(weights | {"blocks.0.attn2.norm_added_x.weight": torch.ones(24)}, file)
    assert [finding.outcome for finding in check_model(model, only=("weights",)).findings] == ["fail"]


def test_a_model_of_images_comes_back_from_its_folder(model: VideoModel, tmp_path: Path) -> None:
    twin = copy.deepcopy(model.denoiser)
    saved = model.with_part("denoiser", twin, role="student").save(tmp_path)
    assert sorted(path.name for path in saved.iterdir()) == ["card.json", "denoiser.safetensors"]
    clips = [
        m(PROMPTS[:1], **ends(model, 0, 1), num_inference_steps=2) for m in (VideoModel.from_pretrained(saved), model)
    ]
    assert torch.equal(*clips)


def test_an_image_is_asked_for_where_it_is_read(model: VideoModel, experts: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is an image-to-video model: give image \(--image\), \[3, 32, 64\]; got none"
    ):
        model.latents(PROMPTS)
    with pytest.raises(ValueError, match=r"got \[3, 16, 16\]"):
        model.latents(PROMPTS, image=torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="is a text-to-video model"):
        loaded(experts, "wan_experts").latents(PROMPTS, image=pixels(picture()))
    x = Rng(0).randn((1, *model.latent_shape()), "x")
    with pytest.raises(ValueError, match="is an image-to-video network, and the condition has no image_latents"):
        model.denoiser(x, torch.tensor([0.5]), model.text.encode(PROMPTS[:1]))
    two, eye = {"image": pixels(picture()), "last_image": pixels(picture())}, model.part("image")
    if eye.needs_last:
        with pytest.raises(ValueError, match=r"clips between two images; give last_image \(--last-image\)"):
            model.latents(PROMPTS, image=two["image"])
    elif eye.encoder is not None or eye.reads == "frame":
        with pytest.raises(ValueError, match=r"reads the first image of a clip only; leave out last_image"):
            model.latents(PROMPTS, **two)


def test_sample_reads_a_picture(model: VideoModel, tmp_path: Path) -> None:
    saved, file, video = model.save(tmp_path / "model"), tmp_path / "picture.png", tmp_path / "clip.gif"
    picture().resize((60, 60)).save(file)
    options = ["--prompt", "a red ball", "--num-inference-steps", "2", "--output", str(video)]
    options += ["--last-image", str(file)] if model.part("image").needs_last else []
    assert main(["sample", str(saved), "--image", str(file), *options]) == 0 and video.stat().st_size > 0
    assert main(["sample", str(saved), "--image", str(file), str(file), *options]) == 2
    assert main(["sample", str(saved), "--image", str(tmp_path / "prompts.txt"), *options]) != 0


def test_the_authors_names_of_image_layers() -> None:
    embedder, block = "condition_embedder.image_embedder.", "blocks.3.attn2."
    names = {
        f"{embedder}norm1.weight": "img_emb.proj.0.weight",
        f"{embedder}ff.net.0.proj.bias": "img_emb.proj.1.bias",
        f"{embedder}ff.net.2.weight": "img_emb.proj.3.weight",
        f"{embedder}norm2.bias": "img_emb.proj.4.bias",
        f"{embedder}pos_embed": "img_emb.emb_pos",
        f"{block}add_k_proj.weight": "blocks.3.cross_attn.k_img.weight",
        f"{block}add_v_proj.bias": "blocks.3.cross_attn.v_img.bias",
        f"{block}norm_added_k.weight": "blocks.3.cross_attn.norm_k_img.weight",
        "blocks.3.norm2.weight": "blocks.3.norm3.weight",
    }
    assert {name: Wan.authors(name) for name in names} == names
