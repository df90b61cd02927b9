"""Exports for other servers: the files are what these servers' public loaders read, and lead to the noise levels trained for.

What an engine computes is stated here again, from the facts in docs/export.md, not taken from the code under test.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow
from safetensors.torch import load_file

from fewstep.cli import main
from fewstep.core import Seeds
from fewstep.diffusion import CFG, DDIM, Contract, Euler, Exact, Heun, Renoise, Sampler
from fewstep.models import VideoModel
from fewstep.models.adapters.export.engines import ENGINES
from fewstep.models.adapters.export.engines.lightx2v import level, whole_steps
from fewstep.models.adapters.export.engines.page import PAGE
from fewstep.models.source import Diffusers
from tiny_models import IMAGE, IMAGE_SIZE, TINY, save_tiny

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SHIFTED = (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
"""Four even steps under shift 5."""
UNEVEN = (1.0, 0.97, 0.5, 0.45, 0.2, 0.0)
FAMILIES = ("wan", "wan_experts", "wan_ti2v", "wan_image", "wan_ti2v_image", "wan_image_experts", "ltx")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        save_tiny(name, folder)
    return folders


def student_of(
    layouts: dict[str, Path], family: str, sampler: Sampler, *times: tuple[float, ...], guidance: CFG = CFG()
) -> VideoModel:
    size = IMAGE_SIZE if family in IMAGE else TINY[family].size
    model = Diffusers(source=str(layouts[family]), text_dtype="float32", **size).load()
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.01)
    contract = Contract(sampler=sampler, grid=Exact(grids=times), steps=len(times[0]) - 1, guidance=guidance)
    return model.with_part("denoiser", model.denoiser, role="student", contract=contract)


def flags_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The first command of the page: its words before the flags, and the flags."""
    block = re.findall("```sh\n(.*?)\n```", (folder / PAGE).read_text(), re.DOTALL)[0]
    words = shlex.split(block.splitlines()[0].partition(" && ")[2] or block.splitlines()[0])
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    parser = argparse.ArgumentParser()
    for name in {word for word in words[first:] if word.startswith("--")} - {"--omni"}:
        parser.add_argument(name)
    parser.add_argument("--omni", action="store_true")
    return words[:first], vars(parser.parse_args(words[first:]))


@pytest.mark.parametrize(
    ("family", "sampler", "times"),
    [
        ("wan", Renoise(), SHIFTED), ("wan", Euler(), UNEVEN), ("wan", DDIM(), (1.0, 0.0)), ("wan_experts", Euler(), SHIFTED),
        ("wan_ti2v", Renoise(), SHIFTED), ("wan_image", Renoise(), SHIFTED),
        ("wan_image_experts", Euler(), (1.0, 0.95, 0.5, 0.0)),
    ],
)  # fmt: skip
def test_vllm_omni_reads_the_pipeline_and_its_timesteps(
    layouts: dict[str, Path], tmp_path: Path, family: str, sampler: Sampler, times: tuple[float, ...]
) -> None:
    """Its scheduler is diffusers' with shift 1, given the timesteps of `dmd2_config`; stochastic for the solver sde."""
    student = student_of(layouts, family, sampler, times)
    folder = student.export(tmp_path / "made", engine="vllm-omni")
    index = json.loads((folder / "model_index.json").read_text())
    image = "image" in family
    assert index["_class_name"] == ("WanI2VDMD2Pipeline" if image else "WanT2VDMD2Pipeline")
    config = index["dmd2_config"]
    assert set(config) == {"num_inference_steps", "denoising_timesteps", "solver", "guidance_scale"}
    assert config["guidance_scale"] == 1.0 and config["num_inference_steps"] == len(times) - 1
    stochastic = isinstance(sampler, Renoise)
    assert config["solver"] == ("sde" if stochastic else "ode")
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, stochastic_sampling=stochastic)
    theirs.set_timesteps(timesteps=config["denoising_timesteps"])
    torch.testing.assert_close(theirs.sigmas, torch.tensor(times), atol=1e-7, rtol=0)
    words, flags = flags_of(folder)
    assert words == ["vllm", "serve", "./made"] and flags["omni"]
    expected = index.get("boundary_ratio") if "experts" in family else 0.0
    assert float(flags["boundary_ratio"]) == expected
    for part in ("tokenizer", "text_encoder", "vae", "transformer"):  # the folders that the engine opens
        assert (folder / part).is_dir()
    assert (folder / "transformer_2").is_dir() == ("experts" in family)
    assert VideoModel.from_pretrained(folder).fingerprint("denoiser") == student.fingerprint("denoiser")


@pytest.mark.parametrize("sampler", [Renoise(), Euler()])
@torch.no_grad()
def test_with_the_scheduler_of_vllm_omni_the_folder_makes_the_students_clips(
    layouts: dict[str, Path], tmp_path: Path, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers' pipeline around the exported folder, with that scheduler, from the same noise."""
    student = student_of(layouts, "wan", sampler, SHIFTED)
    folder = student.export(tmp_path / "made", engine="vllm-omni")
    config = json.loads((folder / "model_index.json").read_text())["dmd2_config"]
    pipe = WanPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=config["solver"] == "sde")
    own = pipe.scheduler.set_timesteps
    monkeypatch.setattr(
        pipe.scheduler, "set_timesteps", lambda *_, device=None, **__: own(timesteps=config["denoising_timesteps"])
    )
    shape, noise = (1, *student.latent_shape()), Seeds((5,))
    fresh = [noise.randn(shape, f"renoise/{i}") for i in range(4)]
    monkeypatch.setattr(flow, "randn_tensor", lambda shape, **_: fresh.pop(0))
    pipe.set_progress_bar_config(disable=True)
    card = student.card
    theirs = pipe(
        ["a cat"], latents=noise.randn(shape, "start"), output_type="latent", guidance_scale=1.0,
        num_inference_steps=4, num_frames=card.num_frames, height=card.height, width=card.width,
        max_sequence_length=card.parts["text"].args["length"],
    )[0]  # fmt: skip
    torch.testing.assert_close(student.latents(["a cat"], seed=5), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("times", [(1.0, 0.757, 0.522, 0.0), (1.0, 0.0), (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)])
def test_sglang_reads_the_pipeline_and_its_flags(
    layouts: dict[str, Path], tmp_path: Path, times: tuple[float, ...]
) -> None:
    """It takes whole timesteps and, of each, the nearest level of the thousand of shift 8."""
    folder = student_of(layouts, "wan", Renoise(), times).export(tmp_path / "made", engine="sglang")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanDMDPipeline"
    words, flags = flags_of(folder)
    assert words == ["sglang", "serve"] and flags["model_path"] == "./made" and float(flags["flow_shift"]) == 8.0
    table = FlowMatchEulerDiscreteScheduler(shift=8.0)
    steps = [int(word) for word in flags["dmd_denoising_steps"].split(",")]
    found = [table.sigmas[(table.timesteps - step).abs().argmin()].item() for step in steps]
    assert found[0] == 1.0
    assert found == pytest.approx(times[:-1], abs=1e-3)
    assert steps == pytest.approx([1000 * time for time in times[:-1]], abs=1.0)


def sigmas_of(config: dict[str, Any]) -> torch.Tensor:
    """LightX2V: a thousand levels from 1, shifted, of which the list takes those that are so many from the end."""
    levels = torch.linspace(1.0, 0.0, 1001)[:-1]
    levels = config["sample_shift"] * levels / (1 + (config["sample_shift"] - 1) * levels)
    return levels[[1000 - step for step in config["denoising_step_list"]]]


@pytest.mark.parametrize(
    ("family", "sampler", "times"),
    [
        ("wan", Euler(), SHIFTED), ("wan", DDIM(), UNEVEN), ("wan", Renoise(), (1.0, 0.0)), ("wan_image", Euler(), SHIFTED),
        ("wan_experts", Euler(), (1.0, 0.95, 0.7, 0.5, 0.0)), ("wan_image_experts", DDIM(), SHIFTED),
        ("wan", Euler(), (1.0, 15 / 17, 15 / 22, 0.0)),  # three even steps under shift 5, no whole timesteps there
    ],
)  # fmt: skip
def test_lightx2v_reads_the_weights_and_the_configuration(
    layouts: dict[str, Path], tmp_path: Path, family: str, sampler: Sampler, times: tuple[float, ...]
) -> None:
    student = student_of(layouts, family, sampler, times)
    folder = student.export(tmp_path / "made", engine="lightx2v")
    words, flags = flags_of(folder)
    experts, image = "experts" in family, "image" in family
    assert words == ["python", "-m", "lightx2v.server"]
    assert flags["model_cls"] == ("wan2.2_moe_distill" if experts else "wan2.1_distill")
    assert flags["task"] == ("i2v" if image else "t2v")
    config = json.loads((folder / flags["config_json"]).read_text())
    assert all(isinstance(step, int) for step in config["denoising_step_list"])
    assert sigmas_of(config).tolist() == pytest.approx(times[:-1], abs=2.5e-4)
    assert config["infer_steps"] == len(times) - 1 and config["enable_cfg"] is False
    card, network = student.card, json.loads((layouts[family] / "transformer" / "config.json").read_text())
    assert [config[f"target_{k}"] for k in ("video_length", "height", "width")] == [
        card.num_frames,
        card.height,
        card.width,
    ]
    assert config["dim"] // config["num_heads"] == network["attention_head_dim"]
    assert config["in_dim"] == network["in_channels"] and config["num_layers"] == network["num_layers"]
    files = [config[f"{kind}_original_ckpt"] for kind in (("high_noise", "low_noise") if experts else ("dit",))]
    if experts:
        boundary = json.loads((layouts[family] / "model_index.json").read_text())["boundary_ratio"]
        early = config["boundary_step_index"]
        assert 0 < early < len(times) - 1 and times[early - 1] >= boundary > times[early]
    if image:
        assert config["use_image_encoder"] == (network["image_dim"] is not None)
    inside = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
              "cross_attn.o", "ffn.0", "ffn.2"]  # fmt: skip
    outside = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
               "time_projection.1", "head.head"]  # fmt: skip
    if image and network["image_dim"]:
        inside += ["cross_attn.k_img", "cross_attn.v_img"]
        outside += ["img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"]
    expected = {f"{name}.{kind}" for name in outside for kind in ("weight", "bias")} | {"head.modulation"}
    for number in range(network["num_layers"]):
        expected |= {f"blocks.{number}.{name}.{kind}" for name in inside for kind in ("weight", "bias")}
        expected |= {f"blocks.{number}.{name}" for name in ("modulation", "norm3.weight", "norm3.bias")}
        norms = ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"]
        norms += ["cross_attn.norm_k_img"] if image and network["image_dim"] else []
        expected |= {f"blocks.{number}.{norm}.weight" for norm in norms}
    for file in files:
        assert set(load_file(folder / file)) == expected


def test_a_shift_and_whole_timesteps_are_found_for_every_even_grid() -> None:
    """The first level is exact under one shift for every whole number, so that the others can be as near as need be."""
    assert whole_steps(SHIFTED) == (5.0, [1000, 750, 500, 250])
    assert whole_steps((1.0, 0.75, 0.5, 0.25, 0.0)) == (1.0, [1000, 750, 500, 250])
    assert whole_steps((1.0, 0.0)) == (1.0, [1000])
    for shift in (2.0, 3.0, 7.5):
        for count in (2, 3, 4, 6):
            times = tuple(shift * s / (1 + (shift - 1) * s) for s in (1 - i / count for i in range(count)))
            found, steps = whole_steps((*times, 0.0))
            assert [level(step, found) for step in steps] == pytest.approx(times, abs=2.5e-4)


def test_what_an_engine_cannot_run_is_refused(layouts: dict[str, Path], tmp_path: Path) -> None:
    euler, fresh = student_of(layouts, "wan", Euler(), SHIFTED), student_of(layouts, "wan", Renoise(), SHIFTED)
    guided = student_of(layouts, "wan", Euler(), SHIFTED, guidance=CFG(scale=3.0))
    experts, frame = (
        student_of(layouts, "wan_experts", Renoise(), SHIFTED),
        student_of(layouts, "wan_ti2v_image", Euler(), SHIFTED),
    )
    other, low = student_of(layouts, "ltx", Euler(), SHIFTED), student_of(layouts, "wan", Renoise(), (1.0, 0.1, 0.0))
    odd = student_of(layouts, "wan", Euler(), (1.0, 0.9991, 0.5001, 0.1234, 0.0008, 0.0))
    heun = euler.with_part("denoiser", euler.denoiser, contract=Contract(sampler=Heun(), steps=4))
    table: list[tuple[VideoModel, Any, str]] = [
        (fresh, "lightx2v", "draws fresh noise between its steps.*--for vllm-omni or --for sglang or fewstep serve"),
        (euler, "sglang", "makes Euler steps.*--for vllm-omni or --for lightx2v"),
        (experts, "sglang", "text-to-video Wan 2.1 of one network"),
        (frame, "vllm-omni", "clean first frame"), (frame, "lightx2v", "Wan 2.2 TI2V"),
        (low, "sglang", r"no noise level nearer to 0\.1, which"), (odd, "lightx2v", "no shift and whole timesteps"),
        *((other, engine, "is a LTXPipeline; leave --for out") for engine in ENGINES),
        *((guided, engine, "distil the guidance") for engine in ENGINES),
        *((heun, engine, "no sampler for Heun") for engine in ENGINES),
    ]  # fmt: skip
    for model, engine, problem in table:
        with pytest.raises(ValueError, match=problem):
            model.export(tmp_path / "refused", engine=engine)
    with pytest.raises(ValueError, match="nothing to link"):
        euler.export(tmp_path / "refused", engine="lightx2v", link=True)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_page(
    layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page has the levels of both sides, and says what was not checked."""
    folder = student_of(layouts, "wan", Renoise(), SHIFTED, (1.0, 0.5, 0.0)).save(tmp_path / "student")
    assert main(["export", str(folder), str(tmp_path / "made"), "--for", "vllm-omni"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    page = (tmp_path / "made" / PAGE).read_text()
    assert "| 0.9375 | 0.9375 |" in page and "## Not checked" in page and "did not run this folder" in page
    assert "This folder is for 4 steps; " in page and "also trained for 2." in page
    for more in (["--lora"], ["--names", "comfyui"]):
        assert main(["export", str(folder), str(tmp_path / "other"), "--for", "sglang", *more]) == 2
        assert "leave out --lora and --names" in capsys.readouterr().err
