"""Presets: clips as diffusers' own schedulers make them, what authors publish, and what cannot be followed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

import diffusers
from torch import Tensor

from fewstep.cli import main
from fewstep.core import Call, Rng, Seeds, build, dump
from fewstep.core.build import RecipeError
from fewstep.data.pairs import PairPlan
from fewstep.diffusion import (
    CFG,
    NAMED,
    STG,
    Angles,
    Betas,
    Contract,
    DPMpp2M,
    DynamicCFG,
    Exact,
    FixedStride,
    FlowSchedule,
    Kind,
    LinearQuadratic,
    MultistepTimesteps,
    NoisePath,
    Prediction,
    RectifiedFlow,
    SDEDPMpp2M,
    Shifted,
    Timesteps,
    Trained,
    UniPC,
    WholeTimesteps,
)
from fewstep.evaluate.conformance import Options, check_model
from fewstep.models import VideoModel
from fewstep.models.adapters.export.schedulers import exact_scheduler
from fewstep.models.adapters.export.usage import Usage
from fewstep.models.adapters.layout import Layout
from fewstep.models.bundle import read_card
from fewstep.models.source import Diffusers
from support_unets import animatediff
from tiny_models import TINY, save_tiny

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
COGVIDEOX = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0, "clip_sample": False,
    "timestep_spacing": "linspace",
}  # fmt: skip


def made(name: str, folder: Path, scheduler: Any = None, **index: Any) -> Path:
    """A tiny model with another scheduler, and other entries of model_index.json."""
    save_tiny(name, folder)
    file = folder / "model_index.json"
    tree = json.loads(file.read_text())
    if scheduler is not None:
        (folder / "scheduler" / "scheduler_config.json").unlink()
        scheduler.save_pretrained(folder / "scheduler")
        tree["scheduler"] = ["diffusers", type(scheduler).__name__]
    file.write_text(json.dumps(tree | index))
    return folder


def configured(folder: Path, part: str, **values: Any) -> Path:
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def both(name: str, folder: Path, preset: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Latents of ours and of the pipeline's, of the same noise."""
    model = Diffusers(source=str(folder), text_dtype="float32", preset=preset, **TINY[name].size).load()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    card, noise = model.card, Seeds((5, 6)).randn((2, *model.latent_shape()), "start")
    options = {
        "prompt": PROMPTS, "negative_prompt": card.negative_prompt, "num_frames": card.num_frames, "height": card.height,
        "width": card.width, "num_inference_steps": steps, "guidance_scale": 5.0,
    }  # fmt: skip
    theirs = TINY[name].sample(pipeline, noise, **options, output_type="latent")
    return model.latents(PROMPTS, seed=(5, 6), guidance_scale=5.0, num_inference_steps=steps), theirs


# --- the layout's own scheduler ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "wan-unipc": ("wan", diffusers.UniPCMultistepScheduler(**FLOW)),
    "wan-dpm": ("wan", diffusers.DPMSolverMultistepScheduler(**FLOW)),
    "wan-euler": ("wan", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "experts-unipc": ("wan_experts", diffusers.UniPCMultistepScheduler(**FLOW)),
    "cogvideox-ddim": ("cogvideox", diffusers.CogVideoXDDIMScheduler(**COGVIDEOX)),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_with_the_preset_layout_clips_are_the_pipeline_s(case: str, tmp_path: Path) -> None:
    """And without it they are not: docs/models.md says how far away they are."""
    name, scheduler = SCHEDULERS[case]
    folder = made(name, tmp_path, scheduler)
    assert distance(*both(name, folder, "layout", 5)) < 1e-5
    assert distance(*both(name, folder, None, 5)) > 1e-3


@torch.no_grad()
def test_animatediff_as_it_is_documented(tmp_path: Path) -> None:
    """DDIM with `linspace`, as in diffusers' page on AnimateDiff."""
    pipeline = animatediff(timestep_spacing="linspace")
    pipeline.save_pretrained(tmp_path)
    models = [Diffusers(source=str(tmp_path), num_frames=4, preset=preset).load() for preset in ("layout", None)]
    theirs = pipeline(
        PROMPTS, num_frames=4, height=16, width=16, num_inference_steps=6, guidance_scale=7.5, output_type="latent",
        latents=Seeds((5, 6)).randn((2, *models[0].latent_shape()), "start"),
    ).frames  # fmt: skip
    made = [model.latents(PROMPTS, seed=(5, 6), num_inference_steps=6) for model in models]
    assert models[0].card.contract.steps == 25
    assert distance(made[0], theirs) < 1e-5 < distance(made[1], theirs)


def test_the_contract_of_the_preset_layout(tmp_path: Path) -> None:
    folder = made("wan", tmp_path, diffusers.UniPCMultistepScheduler(**FLOW))
    plain, card = read_card(folder), Diffusers(source=str(folder), preset="layout").card()
    assert plain.contract == Contract(steps=50, grid=Shifted(shift=3.0), guidance=CFG(scale=5.0))
    assert card.contract == replace(
        plain.contract, sampler=WholeTimesteps(sampler=UniPC()), grid=FlowSchedule(shift=3.0)
    )
    assert plain.provenance["preset"].startswith("none: Euler or DDIM")
    assert card.provenance["preset"] == "layout: UniPCMultistepScheduler of the layout"
    assert replace(card, contract=plain.contract, provenance=plain.provenance) == plain


@pytest.mark.parametrize("name", ["ltx", "ltx_condition", "hunyuan"])
def test_pipelines_that_give_their_scheduler_its_times_need_no_preset(name: str, tmp_path: Path) -> None:
    folder = made(name, tmp_path)
    assert Diffusers(source=str(folder), preset="layout").card().contract == read_card(folder).contract


REFUSED = {
    "no sampler follows": diffusers.EulerDiscreteScheduler(),
    "solver_order: 3": diffusers.UniPCMultistepScheduler(**FLOW, solver_order=3),
    "solver_type: 'bh1'": diffusers.UniPCMultistepScheduler(**FLOW, solver_type="bh1"),
    "disable_corrector: [0]": diffusers.UniPCMultistepScheduler(**FLOW, disable_corrector=[0]),
    "solver_type: 'heun'": diffusers.DPMSolverMultistepScheduler(**FLOW, solver_type="heun"),
    "algorithm_type: 'sde-dpmsolver++'": diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "shift_terminal: 0.1": diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_schedulers_that_cannot_be_followed_are_refused(said: str, tmp_path: Path) -> None:
    folder = made("wan", tmp_path, REFUSED[said])
    with pytest.raises(RecipeError) as error:
        Diffusers(source=str(folder), preset="layout").card()
    assert said in str(error.value) and "eave the preset out" in str(error.value)


# --- what authors publish ---------------------------------------------------------------------------------------------

UNIPC = WholeTimesteps(sampler=UniPC())
BASE = "色调艳丽，过曝"
Size = tuple[int, int, int, float]


def size_of(card: Any) -> Size:
    return (card.num_frames, card.height, card.width, card.fps)


PUBLISHED: dict[str, tuple[str, int, Size, float, CFG, int, str]] = {
    "Wan2.1-T2V-1.3B-Diffusers": ("wan", 12, (81, 480, 832, 16), 8, CFG(scale=6.0), 50, BASE),
    "Wan2.1-T2V-14B-Diffusers": ("wan", 40, (81, 720, 1280, 16), 5, CFG(scale=5.0), 50, BASE),
    "Wan2.1-I2V-14B-480P-Diffusers": ("wan_image", 40, (81, 480, 832, 16), 3, CFG(scale=5.0), 40, "镜头晃动，" + BASE),
    "Wan2.1-I2V-14B-720P-Diffusers": ("wan_image", 40, (81, 720, 1280, 16), 5, CFG(scale=5.0), 40, "镜头晃动，" + BASE),
    "Wan2.1-FLF2V-14B-720P-diffusers": (
        "wan_ends", 40, (81, 720, 1280, 16), 16, CFG(scale=5.0), 50, "镜头切换，镜头晃动，" + BASE
    ),
    "Wan2.2-T2V-A14B-Diffusers": (
        "wan_experts", 40, (81, 720, 1280, 16), 12, CFG(scale=4.0, low=0.6, outside=3.0), 40, BASE
    ),
    "Wan2.2-I2V-A14B-Diffusers": (
        "wan_image_experts", 40, (81, 720, 1280, 16), 5, CFG(scale=3.5, low=0.9, outside=3.5), 40, BASE
    ),
    "Wan2.2-TI2V-5B-Diffusers": ("wan_ti2v", 24, (121, 704, 1280, 24), 5, CFG(scale=5.0), 50, BASE),
}  # fmt: skip
"""By hand from the authors' repositories: tiny model, heads, size, shift, guidance, steps, how the negative prompt begins."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_wan_s_authors_publish(name: str, tmp_path: Path) -> None:
    tiny, heads, size, shift, guidance, steps, negative = PUBLISHED[name]
    folder = made(tiny, tmp_path / name)
    for part in ("transformer", "transformer_2"):
        if (folder / part).exists():
            configured(folder, part, num_attention_heads=heads)
    plain, card = read_card(folder), Diffusers(source=str(folder), preset="authors").card()
    assert card.contract == Contract(
        sampler=UNIPC, grid=FlowSchedule(scheduler="dpm", shift=shift), steps=steps, guidance=guidance
    )
    assert size_of(card) == size and card.negative_prompt.startswith(negative)
    assert card.negative_prompt.endswith("背景人很多，倒着走")
    assert card.provenance["preset"] == f"authors: github.com/Wan-Video/{name[:6]} generate.py"
    # what needs no preset: size and negative prompt; 14B text-to-video keeps the size that the layout's shift is for
    assert size_of(plain) == ((81, 480, 832, 16) if name.startswith("Wan2.1-T2V") else size)
    assert plain.negative_prompt == card.negative_prompt and plain.contract.grid == Shifted(shift=3.0)


def test_one_s_own_size_comes_before_the_authors(tmp_path: Path) -> None:
    folder = made("wan_ends", tmp_path)
    card = Diffusers(source=str(folder), preset="authors", height=480, width=832, negative_prompt="dark").card()
    assert size_of(card) == (81, 480, 832, 16) and card.negative_prompt == "dark"


@pytest.mark.parametrize(
    ("name", "layers", "licence", "steps", "size", "missing"),
    [
        ("ltx", 28, "0.9 licence (RAIL-M)", 40, (161, 512, 704, 25), ""),
        ("ltx_condition", 28, "0.9.5 licence (OpenRAIL-M)", 40, (161, 512, 704, 25), ""),
        ("ltx_condition", 48, "LTX-Video Open Weights License", 30, (121, 704, 1216, 30), "second pass"),
    ],
)
def test_what_ltx_s_authors_publish(
    name: str, layers: int, licence: str, steps: int, size: Size, missing: str, tmp_path: Path
) -> None:
    folder = configured(made(name, tmp_path), "transformer", num_layers=layers)
    plain, card = read_card(folder), Diffusers(source=str(folder), preset="authors").card()
    for each in (plain, card):
        assert licence in each.provenance["licence"]
        assert each.parts["codec"].args["decode_time"] == 0.05 and each.parts["codec"].args["decode_noise"] == 0.025
    stg = STG(scale=3.0, stg_scale=1.0, blocks=(19,), rescale=0.7)
    assert plain.contract.guidance == CFG(scale=3.0)
    assert card.contract.guidance == (CFG(scale=3.0) if layers == 48 else stg)
    assert ("without" in card.provenance["preset"]) is (layers == 48)
    assert (plain.contract.steps, size_of(plain)) == (50, (161, 512, 704, 25))
    assert (card.contract.steps, size_of(card)) == (steps, size)
    assert missing in card.provenance["preset"] and card.parts["denoiser"].args["fps"] == size[3]
    if name == "ltx_condition":
        assert card.contract.grid == LinearQuadratic(threshold=0.025)


def test_an_export_tells_the_pipeline_the_decoder_s_time(tmp_path: Path) -> None:
    folder = made("ltx", tmp_path)
    model = Diffusers(source=str(folder), text_dtype="float32", **TINY["ltx"].size).load()
    options = Usage(model, Layout.find(str(folder))).options(4)
    assert (options["decode_timestep"], options["decode_noise_scale"]) == (0.05, 0.025)


def test_a_decoder_of_ltx_that_reads_no_time_gets_no_noise(tmp_path: Path) -> None:
    folder = configured(made("ltx", tmp_path), "vae", timestep_conditioning=False)
    assert "decode_time" not in read_card(folder).parts["codec"].args


def test_what_cogvideox_s_authors_publish(tmp_path: Path) -> None:
    """5B: noise between steps, and guidance that changes from step to step; 2B: neither."""
    folder = made("cogvideox", tmp_path, diffusers.CogVideoXDDIMScheduler(**COGVIDEOX))
    card = Diffusers(source=str(folder), preset="authors").card()
    dynamic = DynamicCFG(scale=6.0, counts="timesteps")
    assert card.contract == Contract(
        sampler=SDEDPMpp2M(stride=1000), grid=Timesteps(spacing="trailing"), steps=50, guidance=dynamic
    )
    configured(folder, "transformer", use_rotary_positional_embeddings=False)
    card = Diffusers(source=str(folder), preset="authors").card()
    assert card.contract == Contract(
        sampler=FixedStride(), grid=Timesteps(spacing="trailing"), steps=50, guidance=CFG(scale=6.0)
    )
    assert Diffusers(source=str(folder), preset="layout").card().contract.grid == Timesteps(spacing="linspace")


@torch.no_grad()
@pytest.mark.parametrize(("preset", "dynamic"), [("authors", True), ("layout", False)])
def test_cogvideox_5b_is_sampled_as_by_its_authors(
    preset: Any, dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents of diffusers' pipeline with CogVideoXDPMScheduler and, as in cli_demo.py, `use_dynamic_cfg`, of one noise."""
    from diffusers.schedulers import scheduling_dpm_cogvideox

    scheduler = diffusers.CogVideoXDPMScheduler(**COGVIDEOX | {"timestep_spacing": "trailing"})
    folder, now, noise = made("cogvideox", tmp_path, scheduler), [-1], Seeds((5, 6))
    model = Diffusers(source=str(folder), text_dtype="float32", preset=preset, **TINY["cogvideox"].size).load()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    step, shape = type(scheduler).step, (2, *model.latent_shape())
    monkeypatch.setattr(type(scheduler), "step", lambda *a, **o: (now.__setitem__(0, now[0] + 1), step(*a, **o))[1])
    monkeypatch.setattr(
        scheduling_dpm_cogvideox, "randn_tensor", lambda *_, **__: noise.randn(shape, f"sde/{now[0]}").transpose(1, 2)
    )
    options = {
        "prompt": PROMPTS, "negative_prompt": model.card.negative_prompt, "num_frames": model.card.num_frames,
        "height": model.card.height, "width": model.card.width, "num_inference_steps": 5, "guidance_scale": 6.0,
        "use_dynamic_cfg": dynamic,
    }  # fmt: skip
    theirs = TINY["cogvideox"].sample(pipeline, noise.randn(shape, "start"), **options, output_type="latent")
    assert now == [4]
    ours = model.latents(PROMPTS, seed=(5, 6), num_inference_steps=5)
    assert distance(ours, theirs) < 1e-5
    constant = replace(model.card.contract, guidance=CFG(scale=6.0))
    plain = model.with_card(contract=constant).latents(PROMPTS, seed=(5, 6), num_inference_steps=5)
    assert (distance(plain, ours) > 1e-3) is dynamic


def test_guidance_that_changes_by_hand() -> None:
    """1 + 6 (1 - cos(pi u^5)) / 2: by steps it grows, by timesteps it is as diffusers' pipeline writes it."""
    t = torch.tensor([0.02, 1.0])
    grows = [DynamicCFG(scale=6.0).scales(t, Call(step=i, steps=4)) for i in range(4)]
    assert grows == pytest.approx([1 + 3 * (1 - math.cos(math.pi * u**5)) for u in (0, 0.25, 0.5, 0.75)])
    assert grows[-1] == pytest.approx(1.79578, abs=1e-5)
    jumps = DynamicCFG(scale=6.0, counts="timesteps").scales(t, Call(step=9, steps=50))
    expected = [1 + 6 * (1 - math.cos(math.pi * ((50 - k) / 50) ** 5.0)) / 2 for k in (19, 999)]
    assert torch.as_tensor(jumps).tolist() == pytest.approx(expected, abs=1e-5)
    contract = Contract(guidance=DynamicCFG(scale=6.0, counts="timesteps"))
    names = {cls.__name__: cls for cls in NAMED}
    assert build(Contract, json.loads(json.dumps(dump(contract))), names) == contract
    assert "type" not in dump(Contract(guidance=CFG(scale=6.0)))["guidance"]
    assert not DynamicCFG(scale=1.0).active and contract.calls(5) == 10
    assert DynamicCFG(scale=6.0).rescaled(3.0) == DynamicCFG(scale=3.0)


def test_families_without_a_table_and_students_are_refused(tmp_path: Path) -> None:
    folder = made("hunyuan", tmp_path)
    with pytest.raises(RecipeError, match="there is none for HunyuanVideo; choose layout, or authors for Wan, "):
        Diffusers(source=str(folder), preset="authors").card()
    model = VideoModel.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    student = dump(replace(model.card, role="student"))
    (folder / "model_index.json").write_text(json.dumps(index | {"_fewstep": student}))
    with pytest.raises(RecipeError, match="is a student, which is sampled by its own contract; leave preset out"):
        Diffusers(source=str(folder), preset="layout").card()


# --- export -----------------------------------------------------------------------------------------------------------

EXPORTED: dict[str, tuple[NoisePath, Kind, Contract]] = {
    "UniPCMultistepScheduler": (RectifiedFlow(), "flow", Contract(sampler=UNIPC, grid=FlowSchedule(shift=3.0))),
    "DPMSolverMultistepScheduler": (
        RectifiedFlow(), "flow",
        Contract(sampler=WholeTimesteps(sampler=DPMpp2M()), grid=Trained(grid=FlowSchedule(scheduler="dpm"), steps=(5,))),
    ),
    "UniPCMultistepScheduler-table": (Betas(), "eps", Contract(sampler=UniPC(), grid=MultistepTimesteps())),
    "DPMSolverMultistepScheduler-table": (
        Betas(schedule="linear"), "v", Contract(sampler=DPMpp2M(), grid=MultistepTimesteps(spacing="trailing"))
    ),
    "DDIMScheduler": (Betas(), "eps", Contract(sampler=FixedStride(), grid=Timesteps(spacing="linspace"))),
}  # fmt: skip


def network(x: Tensor, told: Tensor) -> Tensor:
    return 0.7 * torch.sin(1.3 * x) + 0.4 * x.roll(1, 2) * torch.cos(3 * told) + 0.3


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_scheduler_makes_the_same_steps(name: str) -> None:
    path, kind, contract = EXPORTED[name]
    exact = exact_scheduler(path, kind, contract, 5)
    scheduler: Any = exact.scheduler
    assert type(scheduler).__name__ == name.partition("-")[0] and not exact.pinned
    scheduler.set_timesteps(5)
    offset = 0.0 if kind == "flow" else 1e-3

    def denoise(x: Tensor, t: Tensor, call: Call) -> Prediction:
        return Prediction(network(x, t[0] - offset), kind, x, t, path)

    x = theirs = Rng(1).randn((2, 2, 3, 4, 4), "x")
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, timestep / 1000), timestep, theirs).prev_sample
    assert distance(contract.sampler(denoise, x, contract.times(5), rng=Rng(0)), theirs) < 1e-5


UNEXPORTED = {
    "bh1": (RectifiedFlow(), "flow", Contract(sampler=WholeTimesteps(sampler=UniPC(variant="bh1")), grid=FlowSchedule())),
    "exact times": (RectifiedFlow(), "flow", Contract(sampler=UniPC(), grid=FlowSchedule())),
    "the other's times": (RectifiedFlow(), "flow", Contract(sampler=UNIPC, grid=FlowSchedule(scheduler="dpm"))),
    "trained times": (
        RectifiedFlow(), "flow",
        Contract(sampler=UNIPC, grid=Exact(grids=((1.0, 0.9, 0.8, 0.7, 0.6, 0.0),), otherwise=FlowSchedule())),
    ),
    "pure noise": (Betas(zero_snr=True), "v", Contract(sampler=UniPC(), grid=MultistepTimesteps())),
    "another end": (Betas(), "eps", Contract(sampler=FixedStride(ends_clean=False), grid=Timesteps(spacing="linspace"))),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEXPORTED)
def test_what_diffusers_does_not_do_is_refused(name: str) -> None:
    path, kind, contract = UNEXPORTED[name]
    with pytest.raises(ValueError, match="diffusers has no scheduler that does what"):
        exact_scheduler(path, kind, contract, 5)  # type: ignore[arg-type]


def test_an_exported_model_has_the_layout_s_scheduler_again(tmp_path: Path) -> None:
    folder = made("wan", tmp_path / "base", diffusers.UniPCMultistepScheduler(**FLOW))
    model = Diffusers(source=str(folder), text_dtype="float32", preset="layout", **TINY["wan"].size).load()
    out = model.export(tmp_path / "out")
    written = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "UniPCMultistepScheduler" and written["flow_shift"] == 3.0
    assert read_card(out).contract == model.card.contract
    assert distance(*both("wan", out, None, 3)) < 1e-5  # the stamped card keeps the contract


@pytest.mark.parametrize(
    ("case", "preset"), [("wan-unipc", "layout"), ("wan-euler", "layout"), ("wan-unipc", "authors")]
)
def test_check_model_compares_with_what_the_card_follows(case: str, preset: Any, tmp_path: Path) -> None:
    name, scheduler = SCHEDULERS[case]
    source = Diffusers(
        source=str(made(name, tmp_path, scheduler)), text_dtype="float32", preset=preset, **TINY[name].size
    )
    (found,) = check_model(source.load(), Options(**TINY[name].size), only=["times"]).findings
    assert found.outcome == ("pass" if preset == "layout" else "not applicable"), found.note


# --- commands ---------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """What a command would have run."""


def test_pairs_and_evaluate_take_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract that the command runs is the preset's; evaluate's teacher also has the student's size."""
    folder = made("wan", tmp_path / "wan", diffusers.UniPCMultistepScheduler(**FLOW))
    wanted = Diffusers(source=str(folder), preset="layout").card().contract

    def stop(*given: Any, **_: Any) -> None:
        raise Reached(given[0])

    (tmp_path / "p.txt").write_text("a cat")
    words = [str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--model", str(folder), "--preset", "layout"]
    monkeypatch.setattr("fewstep.data.pairs.make_pairs", stop)
    with pytest.raises(Reached) as reached:
        main(["pairs", *words, "--quiet"])
    teacher = reached.value.args[0]
    assert teacher.card.contract == wanted
    course = PairPlan(times=(1.0, 0.5, 0.0), steps=4).resolve(teacher.card.contract)
    assert course.sampler == WholeTimesteps(sampler=UniPC()) and course.grid[0] == 1.0 and 0.5 in course.grid
    size = {"num_frames": 5, "height": 32, "width": 48}
    Diffusers(source=str(folder), **size).load().with_card(role="student").save(tmp_path / "student")
    monkeypatch.setattr("fewstep.evaluate.entries", stop)
    words = [
        "evaluate",
        str(tmp_path / "student"),
        "--teacher",
        str(folder),
        "--output",
        str(tmp_path / "e"),
        "--quiet",
    ]
    for preset, contract in (("layout", wanted), (None, read_card(folder).contract)):
        with pytest.raises(Reached) as reached:
            main([*words, *(["--preset", preset] if preset else [])])
        card = reached.value.args[0].card
        assert card.contract == contract and {name: getattr(card, name) for name in size} == size


def test_a_preset_for_folders_of_fewstep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["pairs", "world:2"], ["evaluate", "world"], ["sample", "world", "--prompt", "a"]):
        assert main([*words, "--preset", "authors", "--output", str(tmp_path / "x.gif")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "--preset authors: world" in said and "of fewstep's own" in said and "leave --preset out" in said


def test_a_grid_that_begins_well_below_noise_has_no_pairs() -> None:
    plan = PairPlan(times=(1.0, 0.5, 0.0))
    for grid in (FlowSchedule(shift=1.0), FlowSchedule(scheduler="dpm", shift=1.0)):
        times = grid.times(4)
        assert times[0] < 1 and plan.resolve(Contract(grid=grid, steps=4)).grid[0] == 1.0
    with pytest.raises(ValueError, match="own grid goes from t = 0.98.* to 0, and pairs go from 1 to 0"):
        plan.resolve(Contract(grid=Angles(), steps=4))
