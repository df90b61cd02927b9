"""Students go back to diffusers: without this package they make the same clips, and they come back as what they were."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from fewstep.attention import BlockCausal
from fewstep.cli import main
from fewstep.core import RecipeError, Rng, Seeds
from fewstep.diffusion import (
    CFG,
    DDIM,
    Betas,
    Contract,
    DPMpp2M,
    Euler,
    Exact,
    Heun,
    RectifiedFlow,
    Renoise,
    Sampler,
    Shifted,
)
from fewstep.models import Lora, VideoModel
from fewstep.models.adapters import export_lora
from fewstep.models.adapters.ddpm import contract_of, path_of
from fewstep.models.adapters.export.readme import restrictions
from fewstep.models.adapters.export.schedulers import exact_scheduler
from fewstep.models.lora import adapt, adapters, merge, save_adapter
from fewstep.models.source import Diffusers
from support_engine import tiny_model
from support_unets import animatediff, scheduler, stable_diffusion
from tiny_models import IMAGE, IMAGE_SIZE, TINY, decoder_noise, save_tiny

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks"]
SIZES: dict[str, dict[str, int]] = {name: tiny.size for name, tiny in TINY.items()} | dict.fromkeys(IMAGE, IMAGE_SIZE)
SIZES |= {"animatediff": {"num_frames": 4}, "stable_diffusion": {}}

PLAIN = """
import json, re, sys
sys.modules["fewstep"] = None  # importing it is an error from here on
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from diffusers.pipelines.ltx import pipeline_ltx
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow, scheduling_lcm as lcm
for name in json.loads(sys.argv[1]):
    for number, code in enumerate(re.findall("```python\\n(.*?)```", open(f"{name}/README.md").read(), re.DOTALL)):
        exec(code)
        pipe.set_progress_bar_config(disable=True)
        if "hunyuan15" in name:
            pipe.vae.enable_slicing()  # it decodes two clips only so
        given, made = load_file(f"{name}.given"), {}
        for kind in ("latent", "np"):
            noises = [given[key] for key in sorted(given) if key.startswith("renoise")]
            flow.randn_tensor = lcm.randn_tensor = lambda shape, **_: noises.pop(0)
            pipeline_ltx.randn_tensor = lambda *_, **__: given["decoder"]
            shown = [Image.open("image.png")] if "image" in name else []
            out = pipe(*shown, json.loads(sys.argv[2]), latents=given["start"], output_type=kind, **sampling)
            made[kind] = torch.as_tensor(out[0]).contiguous()
        save_file(made, f"{name}.made{number}")
assert sys.modules["fewstep"] is None
"""
"""Runs the code of every page as it stands, with plain diffusers, from given latents and noises."""


PICTURE = (255 * Rng(0).rand((IMAGE_SIZE["height"], IMAGE_SIZE["width"], 3), "picture")).to(torch.uint8)
"""First frames of image-to-video clips."""


@dataclass(frozen=True)
class Case:
    """A student of few steps."""

    family: str
    sampler: Sampler
    times: tuple[tuple[float, ...], ...]
    """A grid per step count: the default, then the others, increasing."""
    guidance: CFG = CFG()

    @property
    def contract(self) -> Contract:
        grid, steps = Exact(grids=self.times), len(self.times[0]) - 1
        return Contract(sampler=self.sampler, grid=grid, steps=steps, guidance=self.guidance)


EXPERTS = CFG(scale=4.0, low=0.6, outside=3.0)
"""As the tiny model's boundary says."""
SHIFTED = (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
UNEVEN = (1.0, 0.97, 0.5, 0.45, 0.2, 0.0)
CASES = {
    "wan-one": Case("wan", Renoise(), ((1.0, 0.0),)),
    "wan-shifted": Case("wan", Euler(), (SHIFTED, (1.0, 0.5, 0.0), UNEVEN)),
    "wan-uneven": Case("wan", DDIM(), (UNEVEN,), CFG(scale=3.0)),
    "wan-renoise": Case("wan", Renoise(), (SHIFTED,)),
    "animatediff-even": Case("animatediff", DDIM(), ((1.0, 0.75, 0.5, 0.25, 0.0),)),
    "animatediff-uneven": Case("animatediff", DDIM(), ((1.0, 0.9, 0.3, 0.0),), CFG(scale=2.0)),
    "animatediff-between": Case("animatediff", DDIM(), ((1.0, 0.9375, 0.62543, 0.0),)),
    "animatediff-renoise": Case("animatediff", Renoise(), ((1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.6, 0.0))),
    "stable_diffusion": Case("stable_diffusion", DDIM(), ((1.0, 0.5, 0.0),)),
    "ltx-shifted": Case("ltx", Euler(), (SHIFTED, (1.0, 0.0), (1.0, 0.5, 0.0), UNEVEN)),
    "ltx-renoise": Case("ltx", Renoise(), ((1.0, 0.9, 0.6, 0.0),), CFG(scale=2.0)),
    "cogvideox-even": Case("cogvideox", DDIM(), ((1.0, 0.75, 0.5, 0.25, 0.0),), CFG(scale=3.0)),
    "cogvideox-uneven": Case("cogvideox", DDIM(), ((1.0, 0.9, 0.3, 0.0), (1.0, 0.0))),
    "cogvideox15": Case("cogvideox15", DDIM(), ((1.0, 0.9, 0.3, 0.0),), CFG(scale=2.0)),
    "cogvideox-renoise": Case("cogvideox", Renoise(), ((1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.6, 0.0))),
    "hunyuan-shifted": Case("hunyuan", Euler(), (SHIFTED, UNEVEN)),
    "hunyuan-renoise": Case("hunyuan", Renoise(), (UNEVEN,)),
    "hunyuan15-shifted": Case("hunyuan15", DDIM(), (SHIFTED, UNEVEN)),
    "hunyuan15-renoise": Case("hunyuan15", Renoise(), ((1.0, 0.0),)),
    "wan_ti2v": Case("wan_ti2v", Renoise(), (SHIFTED,)),
    "wan_experts-shifted": Case("wan_experts", Euler(), (SHIFTED, (1.0, 0.6, 0.0))),
    "wan_image": Case("wan_image", Renoise(), (SHIFTED,)),
    "wan_ti2v_image": Case("wan_ti2v_image", Euler(), (SHIFTED,)),
    "wan_image_experts": Case("wan_image_experts", Euler(), ((1.0, 0.95, 0.5, 0.0),)),
    "wan_experts-guided": Case("wan_experts", Renoise(), (UNEVEN,), EXPERTS),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher's folder by family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SIZES}
    for name in (*TINY, *IMAGE):
        save_tiny(name, folders[name])
    animatediff().save_pretrained(folders["animatediff"])
    stable_diffusion().save_pretrained(folders["stable_diffusion"])
    return folders


def student_of(layouts: dict[str, Path], case: Case, **card: Any) -> VideoModel:
    """A teacher with other weights and a contract of its own."""
    model = Diffusers(source=str(layouts[case.family]), text_dtype="float32", **SIZES[case.family]).load()
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.01)
    return model.with_part("denoiser", model.denoiser, role="student", contract=case.contract, **card)


@pytest.fixture(scope="module")
def exported(layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[VideoModel, Path]]:
    """Every student and its folder, after one process of plain diffusers has made clips with all of them."""
    root, made = tmp_path_factory.mktemp("exported"), {}
    Image.fromarray(PICTURE.numpy()).save(root / "image.png")
    for name, case in CASES.items():
        student = student_of(layouts, case)
        made[name] = student, student.export(root / name)
        shape, noise = (2, *student.latent_shape()), Seeds((5, 6))
        given = {key: noise.randn(shape, key) for key in ("start", *(f"renoise/{i}" for i in range(5)))}
        pack = student.denoiser.backbone.original().pack
        given = {key: pack(value).contiguous() for key, value in given.items()}
        if "decode_noise" in student.card.parts["codec"].args:
            given["decoder"] = decoder_noise(torch.empty(shape)).contiguous()
        save_file(given, root / f"{name}.given")
    command = [sys.executable, "-c", PLAIN, json.dumps(list(CASES)), json.dumps(PROMPTS)]
    ran = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_plain_diffusers_makes_the_same_clips(exported: dict[str, tuple[VideoModel, Path]], name: str) -> None:
    (student, folder), case = exported[name], CASES[name]
    for number, times in enumerate(case.times):
        theirs = load_file(folder.parent / f"{name}.made{number}")
        options: dict[str, Any] = {"seed": (5, 6), "num_inference_steps": len(times) - 1}
        if "image" in student.parts:
            options["image"] = PICTURE.permute(2, 0, 1) / 127.5 - 1
        ours = student.latents(PROMPTS, **options)
        made = student.denoiser.backbone.original().unpack(theirs["latent"], ours.shape)
        assert made.std() > 0.1
        torch.testing.assert_close(ours, made, atol=1e-4, rtol=1e-4)
        frames = (student(PROMPTS, **options) / 2 + 0.5).movedim(1, -1)
        torch.testing.assert_close(frames.reshape(theirs["np"].shape), theirs["np"], atol=1e-4, rtol=1e-4)


ROUND = ("wan-shifted", "wan-one", "animatediff-renoise", "stable_diffusion", "ltx-shifted", "cogvideox-uneven",
         "hunyuan-shifted", "hunyuan15-shifted", "wan_ti2v", "wan_experts-guided", "wan_image")  # fmt: skip


@pytest.mark.parametrize("name", ROUND)
def test_the_round_trip_is_exact(exported: dict[str, tuple[VideoModel, Path]], name: str, tmp_path: Path) -> None:
    student, folder = exported[name]
    back = VideoModel.from_pretrained(folder)
    for part in student.parts:
        ours, theirs = student.part(part).state_dict(), back.part(part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert back.fingerprint(part) == student.fingerprint(part) == back.card.fingerprints[part]
    own = {"sources": {}, "fingerprints": {}, "parts": {}}  # parts have their defaults written out, and the same prints
    assert replace(back.card, **own) == replace(student.card, **own)
    assert set(back.card.sources.values()) == {str(folder)}
    again = back.export(tmp_path / name)
    assert VideoModel.from_pretrained(again).fingerprint("denoiser") == student.fingerprint("denoiser")
    assert back.save(tmp_path / "own").joinpath("denoiser.safetensors").is_file()


def test_other_times_make_other_clips(exported: dict[str, tuple[VideoModel, Path]]) -> None:
    """The comparison above would see a wrong grid."""
    student, folder = exported["wan-shifted"]
    theirs = load_file(folder.parent / "wan-shifted.made0")["latent"]
    plain = Contract(steps=4, grid=Shifted(shift=4.0))
    wrong = student.with_part("denoiser", student.denoiser, contract=plain).latents(PROMPTS, seed=(5, 6))
    assert (wrong - theirs).abs().max() > 1e-2


def test_the_default_needs_no_pinned_times(exported: dict[str, tuple[VideoModel, Path]]) -> None:
    """Whoever types `pipe(prompt, num_inference_steps=4)` gets the trained times."""
    pages = {name: (folder / "README.md").read_text() for name, (_, folder) in exported.items()}
    first = {name: re.findall("```python\n(.*?)```", page, re.DOTALL)[0] for name, page in pages.items()}
    pinned = {name for name, code in first.items() if "set_timesteps" in code}
    assert pinned == {
        "wan-uneven", "animatediff-uneven", "animatediff-between", "cogvideox15", "cogvideox-uneven", "hunyuan-renoise",
        "ltx-renoise", "wan_experts-guided",
    }  # fmt: skip


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("terminal", [0.0, 0.1])
@pytest.mark.parametrize("uniform", [False, True])
def test_every_shifted_grid_is_a_setting_of_diffusers(shift: float, steps: int, terminal: float, uniform: bool) -> None:
    contract = Contract(steps=steps, grid=Shifted(shift=shift, terminal=terminal))
    exact = exact_scheduler(RectifiedFlow(), "flow", contract, steps, uniform=uniform)
    assert not exact.pinned
    if uniform:  # as the pipelines of LTX and HunyuanVideo ask
        exact.scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=1.3)
    else:
        exact.scheduler.set_timesteps(steps)
    expected = torch.tensor(contract.times(), dtype=torch.float64).float()
    torch.testing.assert_close(exact.scheduler.sigmas, expected, atol=1e-6, rtol=0)


def test_pinned_times_stay_whatever_is_asked_for() -> None:
    """On the device that is asked for; and pipelines that look for the argument `sigmas` find it."""
    exact = exact_scheduler(RectifiedFlow(), "flow", Contract(grid=Exact(grids=(UNEVEN,))), 5)
    scheduler = exact.pin()
    assert exact.pinned and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    for asked in ({"num_inference_steps": 5}, {"sigmas": [1.0, 0.5], "mu": 2.0}):
        scheduler.set_timesteps(**asked, device="meta")
        assert scheduler.timesteps.device.type == "meta" and len(scheduler.timesteps) == 5
        scheduler.set_timesteps(**asked)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor(UNEVEN))


@pytest.mark.parametrize("path", [Betas(snr_shift=3.0, zero_snr=True), Betas(snr_shift=2.0)], ids=["zero", "rest"])
@pytest.mark.parametrize("sampler", [DDIM(), Renoise()], ids=["ddim", "renoise"])
def test_a_shifted_table_is_kept_level_by_level(path: Betas, sampler: Sampler) -> None:
    """The same signal at every level; the first counts as clean where nothing begins there."""
    contract = Contract(sampler=sampler, grid=Exact(grids=((1.0, 0.9, 0.3, 0.0),)))
    exact = exact_scheduler(path, "v", contract, 3)
    levels = torch.arange(1, path.num_train_timesteps + 1, dtype=torch.float64) / path.num_train_timesteps
    expected = path.coeffs(levels).a.square().float()
    if sampler == DDIM():
        expected[0] = 1.0
    torch.testing.assert_close(exact.scheduler.alphas_cumprod, expected, atol=1e-5, rtol=0)
    assert exact.pinned == {"timesteps": [999.0, 899.0, 299.0]}


@pytest.mark.parametrize(
    "settings",
    [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing", "set_alpha_to_one": True}],
    ids=["leading", "trailing"],
)
def test_a_teacher_keeps_its_own_timesteps(settings: dict[str, Any]) -> None:
    theirs = scheduler("linear", **settings)
    contract = contract_of(theirs.config, steps=25, scale=7.5)
    exact = exact_scheduler(path_of(theirs.config), "eps", contract, 25)
    theirs.set_timesteps(25)
    exact.scheduler.set_timesteps(25)
    assert not exact.pinned and torch.equal(exact.scheduler.timesteps, theirs.timesteps)
    assert exact.scheduler.final_alpha_cumprod == theirs.final_alpha_cumprod
    torch.testing.assert_close(exact.scheduler.alphas_cumprod, theirs.alphas_cumprod)


def test_what_diffusers_cannot_do_is_refused(layouts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VideoDiT is fewstep's own"):
        tiny_model().export(tmp_path / "world")
    for sampler in (Heun(), DPMpp2M()):
        with pytest.raises(ValueError, match=f"no scheduler that does what {type(sampler).__name__} does"):
            exact_scheduler(RectifiedFlow(), "flow", Contract(sampler=sampler), 4)
    with pytest.raises(ValueError, match=r"times \[1\.0, 0\.33333, 0\.0\]"):  # between two timesteps
        exact_scheduler(Betas(), "eps", Contract(sampler=Renoise(), grid=Exact(grids=((1.0, 0.33333, 0.0),))), 2)
    with pytest.raises(ValueError, match="predicts x0"):
        exact_scheduler(RectifiedFlow(), "x0", Contract(), 4)
    student = student_of(layouts, CASES["wan-one"])
    causal = Diffusers(source=str(layouts["wan"]), pattern=BlockCausal(chunk=1), **SIZES["wan"]).load()
    with pytest.raises(ValueError, match="this one is causal"):
        causal.export(tmp_path / "causal")
    with pytest.raises(ValueError, match="this one is causal"):
        causal.export(tmp_path / "causal", names="comfyui")
    with pytest.raises(ValueError, match="nothing to link"):
        student.export(tmp_path / "linked", names="comfyui", link=True)
    experts = student_of(layouts, CASES["wan_experts-guided"])
    for model, guidance in ((student, CFG(scale=3.0, high=0.9)), (experts, CFG(scale=3.0, low=0.5))):
        part_time = replace(model.card.contract, guidance=guidance)
        with pytest.raises(ValueError, match="guides at all times"):
            model.with_part("denoiser", model.denoiser, contract=part_time).export(tmp_path / "guided")
    with pytest.raises(ValueError, match="come from one layout"):
        student.with_part("codec", student.codec).export(tmp_path / "codec")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        student.export(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_stamp_may_not_import_code(exported: dict[str, tuple[VideoModel, Path]], tmp_path: Path) -> None:
    index = json.loads((exported["wan-one"][1] / "model_index.json").read_text())
    index["_fewstep"]["parts"]["codec"]["type"] = "outsider:Mine"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match=r"model_index\.json: parts\.codec\.type is 'outsider:Mine'"):
        VideoModel.from_pretrained(tmp_path)


def test_the_page_says_where_a_student_comes_from(layouts: dict[str, Path], tmp_path: Path) -> None:
    chain = {
        "teacher.source": "owner/model",
        "licence": "Apache-2.0",
        "teacher.licence": "Apache-2.0",
        "recipe": "abc",
        "data": "A|B",
    }
    student = student_of(layouts, CASES["wan-one"], provenance=chain, scores={"accuracy (n = 64)": 0.87654})
    page = (student.export(tmp_path / "free", link=True) / "README.md").read_text()
    assert "# free\n" in page and "wan" in page and "distilled to 1 step:" in page
    assert "It was made from:\n\n- teacher: Apache-2.0\n" in page and 'pipeline_tag: "text-to-video"' in page
    assert "Figures without n" not in page and "## Recipe" not in page
    assert 'license: "apache-2.0"' in page and 'base_model: "owner/model"' in page and "commercial" not in page
    assert "| data | A\\|B |" in page and "| accuracy (n = 64) | 0.8765 |" in page and "| recipe | abc |" in page
    assert (tmp_path / "free" / "vae").is_symlink() and not (tmp_path / "free" / "transformer").is_symlink()
    bound = chain | {"teacher.teacher.licence": "CC-BY-NC-4.0", "teacher.data": "clips for research only"}
    page = (
        student_of(layouts, CASES["wan-one"], provenance=bound).export(tmp_path / "bound") / "README.md"
    ).read_text()
    assert "**Not for commercial use.**" in page and 'license: "other"' in page and "Not measured." in page
    assert page.index("Not for commercial") < page.index("## Sampling")
    assert "- teacher.teacher.licence: CC-BY-NC-4.0" in page and "- teacher.data: clips for research only" in page


@pytest.mark.parametrize(
    ("licence", "bound"),
    [
        ("CC BY-NC 4.0", True), ("FLUX.1 [dev] Non-Commercial License", True), ("for research purposes only", True),
        ("Not for commercial use", True), ("Research-use-only", True), ("academic use", True), ("MIT", False),
        ("Apache-2.0; trained on clips rendered by fewstep.world only, from random weights", False),
        ("Tencent Hunyuan Community License", False), ("openrail++", False), ("Academic Free License v3.0", False),
        ("OpenVid-1M, CC-BY-4.0", False),
    ],
)  # fmt: skip
def test_words_that_forbid_commercial_use(licence: str, bound: bool) -> None:
    """In whatever entry of the chain they are."""
    assert bool(restrictions({"student.data.licence": licence})) is bound


def test_recipe_and_figures_are_on_the_page(layouts: dict[str, Path], tmp_path: Path) -> None:
    """The recipe as text, and what `fewstep evaluate` measured of these very weights, with n."""
    student = student_of(layouts, CASES["wan-one"], scores={"rule": 0.7})
    student.save(tmp_path / "student")
    (tmp_path / "student" / "recipe.yaml").write_text("# Hash abc.\nmethod: {type: DMD2}\n")
    demo = json.loads(Path("docs/results/demo.json").read_text())
    (right,) = (row["accuracy"] for row in demo["rows"] if row["name"] == "student 1")
    weights = student.fingerprint("denoiser")
    for name, its in (("other", "0" * 12), ("own", weights)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(
            json.dumps(demo | {"models": {"teacher 50": "x", "student 1": its}})
        )
    command = ["export", str(tmp_path / "student"), str(tmp_path / "four-by-four"), "--evaluation"]
    assert main([*command, str(tmp_path / "other")]) == 2 and not (tmp_path / "four-by-four").exists()
    assert main([*command, str(tmp_path / "own")]) == 0
    page = (tmp_path / "four-by-four" / "README.md").read_text()
    assert "## Recipe\n\n```yaml\n# Hash abc.\nmethod: {type: DMD2}\n```" in page
    assert f"| all attributes right, 1 step (n = 128) | {right:.4g}" in page and "teacher 50, 1 step" in page
    assert "| rule | 0.7 |" in page and "Figures without n are those of the recipe's `probe`" in page
    again = tmp_path / "again"
    assert main(["export", str(tmp_path / "four-by-four"), str(again)]) == 0  # nothing is lost on the way back
    assert (again / "README.md").read_text() == page.replace("four-by-four", "again")


# --- adapters, and the names of Wan's authors -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family the folder of a student that was trained with adapters, as a run writes it."""
    folders = {}
    targets = ("to_q", "to_k", "to_v", "to_out.0", "net.2")
    for name, case, lora in (
        ("wan", CASES["wan-uneven"], Lora(rank=3, alpha=2.0)),
        ("animatediff", CASES["animatediff-even"], Lora(rank=3, alpha=2.0, targets=targets)),
        ("ltx", CASES["ltx-shifted"], Lora(rank=2)),
        ("cogvideox", CASES["cogvideox-uneven"], Lora(rank=2)),
        ("hunyuan", CASES["hunyuan-shifted"], Lora(rank=2)),
        ("hunyuan15", CASES["hunyuan15-shifted"], Lora(rank=2)),
        ("wan_experts", CASES["wan_experts-shifted"], Lora(rank=2)),
    ):
        teacher = Diffusers(source=str(layouts[name]), text_dtype="float32", **SIZES[name]).load()
        network = adapt(teacher.denoiser, lora, Rng(0))
        with torch.no_grad():
            for adapter in adapters(network).values():
                adapter.lora_B.weight.copy_(0.3 * Rng(1).randn(tuple(adapter.lora_B.weight.shape), "b"))
        whole = teacher.with_part("denoiser", merge(teacher.denoiser, network), role="student", contract=case.contract)
        folders[name] = whole.save(tmp_path_factory.mktemp("runs") / name)
        save_adapter(network, folders[name] / "adapter", teacher.card.name)
    return folders


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("wan", "diffusers"),
        ("wan", "comfyui"),
        *((f, "diffusers") for f in ("animatediff", "ltx", "cogvideox", "hunyuan")),
    ],
)
@torch.no_grad()
def test_diffusers_loads_every_key_of_the_adapters(
    tuned: dict[str, Path], family: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is missing, nothing is left over, and the pipeline is the student."""
    command = ["export", str(tuned[family]), str(tmp_path / "lora"), "--lora", "--names", names]
    assert main(command) == 0
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    written = load_file(file)
    assert file.name == ("pytorch_lora_weights.safetensors" if names == "diffusers" else "lora.safetensors")
    first = {
        "wan diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "wan comfyui": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "animatediff diffusers": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    }
    assert first.get(f"{family} {names}", file.name) in {*written, "pytorch_lora_weights.safetensors"}

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(re.findall("```python\n(.*?)```", (tmp_path / "lora" / "README.md").read_text(), re.DOTALL)[0], scope)
    pipe, student = scope["pipe"], VideoModel.from_pretrained(tuned[family])
    original, folder = student.denoiser.backbone.original(), student.denoiser.backbone.folders[0]
    network = getattr(pipe, folder)
    loaded = get_peft_model_state_dict(network, adapter_name="default_0")
    assert len(loaded) == len(written) > 20
    assert {tuple(v.shape): 0 for v in loaded.values()} == {tuple(v.shape): 0 for v in written.values()}
    if names == "diffusers":
        assert all(torch.equal(loaded[key.removeprefix(f"{folder}.")], value) for key, value in written.items())
    teacher = Diffusers(source=next(iter(student.card.sources.values()))).load()
    for ours, merged in zip(
        student.denoiser.parameters(), teacher.with_lora(tmp_path / "lora").denoiser.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, merged)  # read back here, too
    start = Seeds((5, 6)).randn((2, *student.latent_shape()), "start")

    def theirs() -> Tensor:
        made = pipe(PROMPTS, latents=original.pack(start), output_type="latent", **scope["sampling"])[0]
        return original.unpack(made, start.shape)

    ours = student.latents(PROMPTS, seed=(5, 6))
    torch.testing.assert_close(ours, theirs(), atol=2e-4, rtol=2e-4)
    pipe.unload_lora_weights()
    assert (theirs() - ours).abs().max() > 1e-2


def test_a_pipeline_that_loads_no_lora_gets_none(tuned: dict[str, Path], tmp_path: Path) -> None:
    student = VideoModel.from_pretrained(tuned["hunyuan15"])
    with pytest.raises(ValueError, match="loads no LoRA into its HunyuanVideo15Pipeline"):
        export_lora(student, tuned["hunyuan15"] / "adapter", tmp_path / "lora", names="diffusers")
    assert not (tmp_path / "lora").exists()


@torch.no_grad()
def test_two_experts_are_two_files(tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page loads both; ComfyUI's have the same names in each, and diffusers' converter turns them back."""
    student = VideoModel.from_pretrained(tuned["wan_experts"])
    files = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"]
    export_lora(student, tuned["wan_experts"] / "adapter", tmp_path / "lora", names="diffusers")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(re.findall("```python\n(.*?)```", (tmp_path / "lora" / "README.md").read_text(), re.DOTALL)[0], scope)
    pipe = scope["pipe"]
    for network, file in zip((pipe.transformer, pipe.transformer_2), files, strict=True):
        (name,) = network.peft_config
        loaded, written = get_peft_model_state_dict(network, adapter_name=name), load_file(Path("lora", file))
        assert {f"transformer.{key}" for key in loaded} == written.keys() and len(written) > 20
        assert all(torch.equal(loaded[key.removeprefix("transformer.")], value) for key, value in written.items())
    start = Seeds((5, 6)).randn((2, *student.latent_shape()), "start")
    theirs = pipe(PROMPTS, latents=start, output_type="latent", **scope["sampling"])[0]
    torch.testing.assert_close(student.latents(PROMPTS, seed=(5, 6)), theirs, atol=2e-4, rtol=2e-4)
    export_lora(student, tuned["wan_experts"] / "adapter", tmp_path / "comfy", names="comfyui")
    comfy = [load_file(tmp_path / "comfy" / name) for name in ("comfy.safetensors", "comfy_2.safetensors")]
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in comfy[0].keys() & comfy[1].keys()
    student.export(tmp_path / "whole", names="comfyui")
    for folder, file in zip(
        ("transformer", "transformer_2"), ("whole.safetensors", "whole_2.safetensors"), strict=True
    ):
        back = convert_wan_transformer_to_diffusers(load_file(tmp_path / "whole" / file))
        original = student.denoiser.backbone.original().networks[folder].state_dict()
        assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("name", ["wan-shifted", "ltx-shifted", "wan_experts-guided", "animatediff-renoise"])
def test_in_half_the_bytes_a_network_is_what_diffusers_would_make_of_it(
    layouts: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page loads it so, the codec stays exact, and it comes back with the fingerprint that the card says."""
    student = student_of(layouts, CASES[name])
    whole, half = student.export(tmp_path / "whole"), student.export(tmp_path / "half", dtype="bfloat16")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(re.findall("```python\n(.*?)```", (half / "README.md").read_text(), re.DOTALL)[0], scope)
    for part in student.denoiser.backbone.original().networks:
        loaded, file = getattr(scope["pipe"], part), f"{part}/diffusion_pytorch_model.safetensors"
        theirs = type(loaded).from_pretrained(whole / part, torch_dtype=torch.bfloat16).state_dict()
        written = load_file(half / file)
        assert theirs.keys() == written.keys() == loaded.state_dict().keys()
        for key, value in loaded.state_dict().items():
            assert value.dtype == theirs[key].dtype == written[key].dtype
            assert torch.equal(value, theirs[key]) and torch.equal(value, written[key])
        assert (half / file).stat().st_size < 0.7 * (whole / file).stat().st_size
    assert scope["pipe"].vae.dtype == torch.float32
    back = VideoModel.from_pretrained(half)
    assert back.fingerprint("denoiser") == back.card.fingerprints["denoiser"] != student.fingerprint("denoiser")


def test_every_file_can_have_half_the_bytes(tuned: dict[str, Path], tmp_path: Path) -> None:
    """One file for ComfyUI, and a LoRA; a text encoder that its layout stores in half is loaded so."""
    student = VideoModel.from_pretrained(tuned["wan"])
    written = load_file(student.export(tmp_path / "wan", names="comfyui", dtype="float16") / "wan.safetensors")
    assert written["blocks.0.self_attn.q.weight"].dtype == torch.float16
    assert written["blocks.0.modulation"].dtype == torch.float32  # diffusers keeps it so
    adapter = tuned["wan"] / "adapter"
    export_lora(student, adapter, tmp_path / "lora", names="diffusers", dtype="bfloat16")
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in lora.values()} == {torch.bfloat16}
    layout = Path(student.card.sources["text"])
    shutil.copytree(layout, tmp_path / "layout")
    UMT5EncoderModel.from_pretrained(layout / "text_encoder").bfloat16().save_pretrained(
        tmp_path / "layout/text_encoder"
    )
    moved = student.with_card(sources=dict.fromkeys(student.card.sources, str(tmp_path / "layout")))
    page = (export_lora(moved, adapter, tmp_path / "other", names="diffusers") / "README.md").read_text()
    assert 'torch_dtype={"text_encoder": torch.bfloat16})' in page and "import torch\n" in page


def test_the_names_of_wans_authors_are_a_bijection(layouts: dict[str, Path], tmp_path: Path) -> None:
    """Diffusers' own converter turns every name back, and no tensor changes."""
    student = student_of(layouts, CASES["wan-one"])
    written = load_file(student.export(tmp_path / "wan", names="comfyui") / "wan.safetensors")
    assert "In 1 step the noise levels are 1, 0." in (tmp_path / "wan" / "README.md").read_text()
    own = student.denoiser.backbone.state_dict()
    assert len(written) == len(own)
    assert {
        "head.modulation",
        "blocks.1.modulation",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.0.norm3.weight",
    } <= written.keys()
    back = convert_wan_transformer_to_diffusers(dict(written))
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)


def test_a_student_without_adapters_has_no_lora_file(layouts: dict[str, Path], tmp_path: Path) -> None:
    student = student_of(layouts, CASES["wan-one"])
    with pytest.raises(FileNotFoundError, match=r"only a run with settings\.lora"):
        export_lora(student, tmp_path / "adapter", tmp_path / "lora", names="diffusers")
    assert not (tmp_path / "lora").exists()


def test_adapters_over_another_teacher_are_refused(tuned: dict[str, Path], tmp_path: Path) -> None:
    """A restyled teacher's student is not its layout plus the adapters."""
    student = VideoModel.from_pretrained(tuned["wan"])
    with torch.no_grad():
        student.denoiser.backbone.proj_out.bias.add_(1e-3)
    with pytest.raises(ValueError, match="with these adapters is not this student"):
        export_lora(student, tuned["wan"] / "adapter", tmp_path / "lora", names="diffusers")
    assert not (tmp_path / "lora").exists()


def test_adapters_that_diffusers_cannot_run_are_refused(tuned: dict[str, Path], tmp_path: Path) -> None:
    student = VideoModel.from_pretrained(tuned["animatediff"])
    with pytest.raises(ValueError, match="known for Wan, not for AnimateDiff"):
        export_lora(student, tuned["animatediff"] / "adapter", tmp_path / "lora", names="comfyui")
    student = Diffusers(source=next(iter(student.card.sources.values())), num_frames=4).load()
    network = adapt(student.denoiser, Lora(rank=2), Rng(0))
    x, cond = Rng(0).randn((1, *student.latent_shape()), "x"), student.encode_text(PROMPTS[:1])[0]
    torch.testing.assert_close(network(x, torch.ones(1), cond).raw, student.denoiser(x, torch.ones(1), cond).raw)
    adapter = save_adapter(network, tmp_path / "adapter", "tiny")
    with pytest.raises(ValueError, match=r"fails with adapters on .*proj_in"):
        export_lora(student, adapter, tmp_path / "lora", names="diffusers")


def test_by_command(layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student_of(layouts, CASES["wan-one"]).save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert VideoModel.from_pretrained(tmp_path / "out").card.role == "student"
