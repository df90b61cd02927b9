"""Public few-step weights become students with the contract of their authors, at tiny size with the same names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    WanPipeline,
)
from torch import Tensor

from fewstep.cli import main
from fewstep.core import Seeds
from fewstep.diffusion import CFG, DDIM, Contract, Euler, Exact, Renoise, StepCountError
from fewstep.models import VideoModel
from fewstep.models.known import KNOWN, Known
from fewstep.models.known.importing import Import
from fewstep.models.known.lcm_times import lcm_times
from fewstep.models.known.recognise import named, recognise
from fewstep.models.source import Diffusers
from support_known import lora, start_of
from tiny_models import TINY, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["a red ball", "a cat walks"]
SIZE = TINY["wan"].size
BY_NAME = {known.name: known for known in KNOWN}
STRENGTH = 0.3


WAN_LAYERS = {
    "diffusion_model.blocks.0.self_attn.q": (24, 24), "diffusion_model.blocks.1.cross_attn.o": (24, 24),
    "diffusion_model.blocks.1.ffn.0": (32, 24),
}  # fmt: skip
WAN_OWN = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj")


def merged(base: VideoModel, updates: Mapping[str, Tensor]) -> VideoModel:
    """The base with each update added to the weight it names, by hand."""
    with torch.no_grad():
        for name, update in updates.items():
            base.denoiser.get_parameter(f"backbone.{name}.weight").add_(update)
    return base


# --- the table ----------------------------------------------------------------------------------------------------------------

TIMES = {
    "wan22-lightning": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Euler()),
    "wan21-lightx2v": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Euler()),
    "fastwan22-5b": (3, (1000.0, 757.0, 522.0, 0.0), Renoise()),
    "fastwan-sparse": (3, (1000.0, 757.0, 522.0, 0.0), Renoise()),
    "rcm-wan21": (4, (987.6543, 933.7811, 852.8954, 608.9790, 0.0), Renoise()),
    "turbodiffusion": (4, (987.6543, 933.7811, 852.8954, 608.9790, 0.0), Renoise()),
    "ltx-distilled": (7, (1000.0, 993.7, 987.5, 981.2, 975.0, 909.4, 725.0, 0.0), Euler()),
    "fasthunyuan": (6, (1000.0, 988.3721, 971.4286, 944.4444, 894.7368, 772.7273, 0.0), Euler()),
    "animatelcm": (6, (1000.0, 840.0, 680.0, 500.0, 340.0, 180.0, 0.0), Renoise()),
    "animatediff-lightning": (4, (1000.0, 750.0, 500.0, 250.0, 0.0), DDIM()),
    "lcm-lora-sd15": (4, (1000.0, 760.0, 500.0, 260.0, 0.0), Renoise()),
    "lcm-dreamshaper": (4, (1000.0, 760.0, 500.0, 260.0, 0.0), Renoise()),
    "hyper-sd15": (4, (1000.0, 750.0, 500.0, 250.0, 1.0), DDIM()),
    "hyper-sdxl": (4, (1000.0, 750.0, 500.0, 250.0, 0.0), DDIM()),
    "sdxl-lightning": (4, (1000.0, 750.0, 500.0, 250.0, 0.0), DDIM()),
    "dmd2-sdxl": (4, (1000.0, 750.0, 500.0, 250.0, 0.0), Renoise()),
    "causvid": (3, (1000.0, 757.0, 522.0, 0.0), Renoise()),
    "self-forcing": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Renoise()),
    "causal-forcing": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Renoise()),
    "causal-forcing-framewise": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Renoise()),
    "causal-forcing-2step": (2, (1000.0, 833.3333, 0.0), Renoise()),
    "causal-forcing-1step": (1, (1000.0, 0.0), Renoise()),
    "longlive": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Renoise()),
    "rolling-forcing": (5, (1000.0, 952.3810, 882.3529, 769.2308, 555.5556, 0.0), Renoise()),
    "krea-realtime": (4, (1000.0, 937.5, 833.3333, 625.0, 0.0), Renoise()),
}
"""Default steps, times in thousandths by hand from the sources, and the sampler."""


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_system_has_its_authors_times(known: Known) -> None:
    """A time is `(timestep + 1) / 1000` on tables of betas, and `timestep / 1000` on rectified flow: after the shift, once."""
    steps, times, sampler = TIMES[known.name]
    assert (known.contract.steps, known.contract.sampler) == (steps, sampler)
    assert [1000 * t for t in known.contract.times()] == pytest.approx(times, abs=1e-3)
    with pytest.raises(StepCountError):
        known.contract.times(50)
    guided = {"animatelcm": 1.5}
    assert known.contract.guidance == CFG(scale=guided.get(known.name, 1.0))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_system_says_where_its_facts_come_from(known: Known) -> None:
    assert known.licence and known.bases and known.source
    assert known.facts and all("/" in where for where in known.facts.values())
    assert "licence" in " ".join(known.facts) or "licence" in known.unverified
    assert named(known.name) is known
    module = f"fewstep.models.known.{known.name.replace('-', '_')}"
    assert __import__(module, fromlist=["x"]).__doc__


def test_the_list_says_what_can_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "students", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == [known.name for known in KNOWN]
    assert all(Path(entry["file"]).is_file() for entry in found)
    for entry, known in zip(found, KNOWN, strict=True):
        assert entry["cite"] == known.source and known.what in entry["doc"]
        assert ("Cannot be imported" in entry["doc"]) == bool(known.missing)


@pytest.mark.parametrize("known", [known for known in KNOWN if not known.missing], ids=lambda known: known.name)
def test_a_student_goes_back_to_diffusers(known: Known) -> None:
    """Diffusers has a scheduler for every contract but rCM's, which begins below pure noise."""
    from fewstep.models.adapters.export.schedulers import exact_scheduler

    for steps in known.counts:
        if known.name == "rcm-wan21":
            with pytest.raises(ValueError, match="diffusers has no scheduler"):
                exact_scheduler(known.path, known.kind, known.contract, steps)
        else:
            assert exact_scheduler(known.path, known.kind, known.contract, steps).pin() is not None


@pytest.mark.parametrize("steps", range(2, 9))
def test_times_of_lcm_are_those_of_its_scheduler(steps: int) -> None:
    theirs = LCMScheduler()
    theirs.set_timesteps(steps)
    ours = lcm_times(range(steps, steps + 1)).times(steps)
    assert ours == BY_NAME["lcm-lora-sd15"].contract.times(steps)
    assert [round(1000 * t) - 1 for t in ours[:-1]] == theirs.timesteps.tolist()


NAMES = {
    "Wan22-Lightning/Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors": "wan22-lightning",
    "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1": "wan22-lightning",
    "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors": "wan22-lightning",
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": "wan21-lightx2v",
    "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors": "wan21-lightx2v",
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan22-5b",
    "FastVideo/FastWan2.2-TI2V-5B-Diffusers": "fastwan-sparse",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan-sparse",
    "rCM_Wan2.1_T2V_1.3B_480p.pt": "rcm-wan21",
    "TurboWan2.1-T2V-1.3B-480P.pth": "turbodiffusion",
    "animatediff_lightning_4step_diffusers.safetensors": "animatediff-lightning",
    "AnimateLCM_sd15_t2v_lora.safetensors": "animatelcm",
    "latent-consistency/lcm-lora-sdv1-5": "lcm-lora-sd15",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm-dreamshaper",
    "Hyper-SD15-4steps-lora.safetensors": "hyper-sd15",
    "Hyper-SDXL-4steps-lora.safetensors": "hyper-sdxl",
    "sdxl_lightning_4step_unet.safetensors": "sdxl-lightning",
    "dmd2_sdxl_4step_unet_fp16.bin": "dmd2-sdxl",
    "self_forcing_dmd.pt": "self-forcing",
    "Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "causvid",
    "ltxv-13b-0.9.8-distilled.safetensors": "ltx-distilled",
    "Lightricks/LTX-Video-0.9.7-distilled": "ltx-distilled",
    "FastVideo/FastHunyuan-diffusers": "fasthunyuan",
}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_recognised_by_their_names(name: str) -> None:
    assert recognise(name, list).name == NAMES[name]


def test_what_is_not_clear_is_asked_for() -> None:
    for name in ("my_lora.safetensors", "Hyper-SD15-8steps-CFG-lora.safetensors", "AnimateLCM-SVD-xt.safetensors"):
        with pytest.raises(ValueError, match="give --as NAME, one of wan22-lightning, .*list students"):
            recognise(name, lambda: ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"])
    assert (
        recognise("x.pt", lambda: ["net.blocks.0.self_attn.attn_op.local_attn.proj_l.weight"]).name == "turbodiffusion"
    )
    assert recognise("x.pt", lambda: ["blocks.0.to_gate_compress.weight"]).name == "fastwan-sparse"
    assert recognise("x.pt", lambda: ["time_embedding.cond_proj.weight"]).name == "lcm-dreamshaper"
    with pytest.raises(ValueError, match="Did you mean rcm-wan21"):
        named("rcm-wan2.1")


@pytest.mark.parametrize("known", [known for known in KNOWN if known.missing], ids=lambda known: known.name)
def test_what_cannot_be_imported_says_what_is_missing(
    known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "somewhere", "--as", known.name, "--output", str(tmp_path / "out")]) == 2
    assert f"{known.name} cannot be imported: fewstep lacks {known.missing}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()


# --- Wan: LoRAs ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lightx2v_is_the_merged_lora_on_its_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By command. Diffusers' own pipeline with the same file and the recommended scheduler makes the same clips."""
    file = tmp_path / "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
    updates = lora(file, WAN_LAYERS, seed=1)
    size = [word for key, value in SIZE.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["import", str(file), "--base", str(shared("wan")), *size, "--output", str(tmp_path / "student")]) == 0
    assert "4 steps at times 1, 0.9375, 0.8333, 0.625, 0" in capsys.readouterr().out
    student = VideoModel.from_pretrained(tmp_path / "student")
    card = student.card
    assert (card.name, card.role) == ("wan21-lightx2v", "student")
    assert card.contract == BY_NAME["wan21-lightx2v"].contract
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["card.json", "denoiser.safetensors"]
    assert set(card.sources) == {"text", "codec"} and card.provenance["licence"] == "Apache-2.0"
    assert card.provenance["teacher.licence"] == "Apache-2.0" and file.name in card.provenance["weights"]
    by_hand = merged(
        Diffusers(source=str(shared("wan")), **SIZE).load(),
        {own: updates[name] for own, name in zip(WAN_OWN, WAN_LAYERS)},
    ).with_card(contract=Contract(grid=Exact(grids=((1.0, 0.9375, 5 / 6, 0.625, 0.0),)), sampler=Euler(), steps=4))
    ours = student.latents(PROMPTS, seed=(5, 6))
    torch.testing.assert_close(ours, by_hand.latents(PROMPTS, seed=(5, 6)), atol=1e-5, rtol=1e-5)

    pipe = WanPipeline.from_pretrained(shared("wan"), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(file))
    exact = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.scheduler = exact
    plain = exact.set_timesteps
    exact.set_timesteps = lambda *_, device=None, **__: plain(sigmas=[1.0, 0.9375, 5 / 6, 0.625], device=device)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 512, **SIZE}
    theirs = pipe(PROMPTS, latents=start_of(student), output_type="latent", **options)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    pipe.unload_lora_weights()
    assert (pipe(PROMPTS, latents=start_of(student), output_type="latent", **options)[0] - ours).abs().max() > 1e-2


@torch.no_grad()
def test_lightning_gives_each_expert_its_own_file(tmp_path: Path) -> None:
    """Two calls of the expert for noisy times and two of the other, each with its own LoRA, at 1/8 of its matrices."""
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1"
    high = lora(folder / "high_noise_model.safetensors", WAN_LAYERS, seed=1)
    low = lora(folder / "low_noise_model.safetensors", WAN_LAYERS, seed=2)
    base = {"source": str(shared("wan_experts")), **SIZE}
    student = Import(source=str(folder), base=base["source"], **SIZE).student()
    assert student.card.contract.times() == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0))
    updates = {}
    for index, found in enumerate((high, low)):
        for own, name in zip(WAN_OWN, WAN_LAYERS):
            _, block, rest = own.split(".", 2)
            updates[f"blocks.{block}.experts.{index}.{rest}"] = found[name]
    by_hand = merged(Diffusers(**base).load(), updates).with_card(contract=student.card.contract)
    ours = student.latents(PROMPTS, seed=3)
    torch.testing.assert_close(ours, by_hand.latents(PROMPTS, seed=3), atol=1e-5, rtol=1e-5)
    back = VideoModel.from_pretrained(student.save(tmp_path / "student"))
    assert torch.equal(back.latents(PROMPTS, seed=3), ours)


def test_images_and_text_are_not_confused(tmp_path: Path) -> None:
    """The LoRAs of both have the same shapes."""
    folder = tmp_path / "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1"
    for number, name in enumerate(("high_noise_model", "low_noise_model")):
        lora(folder / f"{name}.safetensors", WAN_LAYERS, seed=number)
    with pytest.raises(ValueError, match="says I2V, and .* is for text to video; give the base"):
        Import(source=str(folder), base=str(shared("wan_experts")), **SIZE).student()
    size = {"num_frames": 5, "height": 32, "width": 64}
    student = Import(source=str(folder), base=str(shared("wan_image_experts")), **size).student()
    assert student.card.role == "student" and "image" in student.card.sources
    renamed = folder.rename(tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1")
    with pytest.raises(ValueError, match="says T2V, and .* is for images to video"):
        Import(source=str(renamed), base=str(shared("wan_image_experts")), **size).student()


# --- whole models -------------------------------------------------------------------------------------------------------------


def rcm_file(path: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> Path:
    """Another tiny Wan as rCM stores it: the authors' names behind `net.`, a matrix for patches, bfloat16, pickled."""
    other = VideoModel.from_pretrained(shared("wan", seed=1)).denoiser.backbone
    tensors = {f"net.{other.authors(name)}": value.bfloat16() for name, value in other.state_dict().items()}
    tensors["net.patch_embedding.weight"] = tensors["net.patch_embedding.weight"].flatten(1)
    change(tensors)
    torch.save(tensors, path)
    return path


@torch.no_grad()
def test_rcm_begins_below_pure_noise(tmp_path: Path) -> None:
    """Its authors' loop, written down again: `x = t noise` at first, then x0 and fresh noise."""
    student = Import(
        source=str(rcm_file(tmp_path / "rCM_Wan2.1_T2V_1.3B_480p.pt")), base=str(shared("wan")), **SIZE
    ).student()
    other = VideoModel.from_pretrained(shared("wan", seed=1)).denoiser.state_dict()
    for name, value in student.denoiser.state_dict().items():
        assert torch.equal(value, other[name].bfloat16().float())
    angles = torch.tensor([torch.atan(torch.tensor(80.0)).item(), 1.5, 1.4, 1.0], dtype=torch.float64)
    times = [*(angles.sin() / (angles.sin() + angles.cos())).tolist(), 0.0]
    cond, _ = student.encode_text(PROMPTS, guided=False)
    noise = Seeds((5, 6))
    x = times[0] * start_of(student)
    for step, (t, s) in enumerate(zip(times, times[1:])):
        flow = student.denoiser(x, torch.full((2,), t), cond).raw
        x = (1 - s) * (x - t * flow)
        if s > 0:
            x = x + s * noise.randn(tuple(x.shape), f"renoise/{step}")
    torch.testing.assert_close(student.latents(PROMPTS, seed=(5, 6)), x, atol=1e-4, rtol=1e-4)
    assert [len(student.card.contract.times(n)) for n in (1, 2, 3, 4)] == [2, 3, 4, 5]


def test_a_layout_keeps_its_own_text_and_codec(tmp_path: Path) -> None:
    """FastWan's folder is a whole model: no base is needed, its denoiser is stored, the rest is named."""
    source = tmp_path / "FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    source.symlink_to(shared("wan_ti2v"))
    size = TINY["wan_ti2v"].size
    student = Import(source=str(source), **size).student()
    assert student.card.contract.times() == (1.0, 0.757, 0.522, 0.0) and student.card.contract.sampler == Renoise()
    back = VideoModel.from_pretrained(student.save(tmp_path / "student"))
    own = VideoModel.from_pretrained(shared("wan_ti2v"))
    assert back.fingerprint("denoiser") == own.fingerprint("denoiser")
    assert set(back.card.sources) == {"text", "codec"} and not back.card.contract.guidance.active
    with pytest.raises(StepCountError):
        back.latents(PROMPTS, num_inference_steps=4)
    with pytest.raises(ValueError, match="would apply it twice"):
        back.latents(PROMPTS, guidance_scale=5.0)


@pytest.mark.parametrize(
    ("name", "family"), [("LTX-Video-0.9.8-13B-distilled", "ltx_condition"), ("FastHunyuan-diffusers", "hunyuan")]
)
def test_other_layouts_are_read(name: str, family: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(shared(family))
    size = {key: TINY[family].size[key] for key in ("num_frames", "height", "width")}
    student = Import(source=str(tmp_path / name), **size).student()
    assert student.card.contract == recognise(name, list).contract and student.card.role == "student"
    assert {key: getattr(student.card, key) for key in size} == size
    assert torch.isfinite(student.latents(["a red ball"])).all()


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    base = str(shared("wan"))
    file = rcm_file(tmp_path / "rcm_wan2.1.pt", lambda t: t.update({"net.blocks.0.ffn.0.weight": torch.ones(48, 24)}))
    with pytest.raises(ValueError, match=r"net\.blocks\.0\.ffn\.0\.weight is \(48, 24\), and the base's \(32, 24\)"):
        Import(source=str(file), base=base, **SIZE).student()
    rcm_file(file, lambda t: t.pop("net.blocks.0.ffn.0.weight"))
    with pytest.raises(
        ValueError, match=r"has no net\.blocks\.0\.ffn\.0\.weight \(1 tensors are missing, 0 are too many\)"
    ):
        Import(source=str(file), base=base, **SIZE).student()
    rcm_file(file, lambda t: t.update({"net.more": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"net\.more belongs to no part of the network"):
        Import(source=str(file), base=base, **SIZE).student()


# --- pickles ------------------------------------------------------------------------------------------------------------------


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "rcm_wan2.1.pt"
    for content in (Trap(), {"net.x": torch.ones(1), "more": Trap()}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="holds more than tensors, and loading that would run its code"):
            Import(source=str(file), base=str(shared("wan")), **SIZE).student()
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="holds more than tensors|cut short"):
        Import(source=str(file), base=str(shared("wan")), **SIZE).student()
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_is_its_averaged_student(tmp_path: Path) -> None:
    """Self-Forcing and others store several networks; a damaged file says so."""
    from fewstep.models.known.weights import open_weights

    file = tmp_path / "x.pt"
    torch.save({"generator": {"a": torch.zeros(1)}, "generator_ema": {"a": torch.ones(1)}, "step": 3}, file)
    assert open_weights(file).read("a") == 1
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cut short"):
        open_weights(file)
    torch.save({"step": 3}, file)
    with pytest.raises(ValueError, match="no tensors in it"):
        open_weights(file)
