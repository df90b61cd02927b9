"""The memory that sampling needs, told before anything is loaded, is what it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import published
from fewstep.attention import NAG
from fewstep.cli import main, running
from fewstep.cli.arguments import Sample
from fewstep.cli.running import runtime_of
from fewstep.core.ledger import Ledger
from fewstep.diffusion import CFG
from fewstep.diffusion.guidance import Calls
from fewstep.models import VideoModel
from fewstep.models import needs as needing
from fewstep.models.bundle import read_card
from fewstep.models.needs import DECODING, DENOISING, READING, Needs, needs, stored_dtype, ways
from fewstep.models.runtime import Offload, Runtime
from support_engine import tiny_model
from tiny_models import load_tiny, shared

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball", "a cat walks")


@pytest.mark.parametrize("family", ["world", "wan", "ltx", "cogvideox", "hunyuan", "wan_experts"])
def test_what_is_planned_is_what_is_taken(family: str) -> None:
    model = VideoModel.from_pretrained("world") if family == "world" else load_tiny(family)
    planned = needs(model.card, Runtime(), clips=2)
    for name, part in model.parts.items():
        if name != "features":
            assert planned.weights[name] == sum(tensor.nbytes for tensor in part.state_dict().values()), name
    cond, negative = model.conditions(PROMPTS)
    with torch.no_grad(), Ledger(model.parts) as denoising:
        for tensor in (*cond.tensors, *negative.tensors):
            denoising.note(tensor)
        latents = model.latents(cond, negative=negative, num_inference_steps=2)
    with torch.no_grad(), Ledger(model.parts) as decoding:
        decoding.note(latents)
        model.decode(latents)
    assert 0.85 < planned.working[DENOISING] / denoising.peak < 1.15
    assert 0.85 < planned.working[DECODING] / decoding.peak < 1.15


@pytest.mark.parametrize(
    ("family", "extra"),
    [pytest.param("wan", None, marks=pytest.mark.slow), ("wan_experts", None), ("cogvideox", None), ("wan", NAG())],
)
def test_guidance_in_two_calls_is_planned_and_takes_less(family: str, extra: NAG | None) -> None:
    model, peaks = load_tiny(family), {}
    cond, negative = model.conditions(PROMPTS)
    for calls in get_args(Calls):
        model.prepared(Runtime(guidance_calls=calls))
        planned = needs(model.card, model.runtime, clips=2, nag=extra).working[DENOISING]
        with torch.no_grad(), Ledger(model.parts) as denoising:
            for tensor in (*cond.tensors, *negative.tensors):
                denoising.note(tensor)
            model.latents(cond, negative=negative, num_inference_steps=2, nag=extra)
        assert 0.85 < planned / denoising.peak < 1.15, calls
        peaks[calls] = planned
    assert peaks["two"] < 0.95 * peaks["one"]  # the text, with its keys, is as large as before


def test_nag_is_planned() -> None:
    """What blocks keep of the negative prompt, and what they read of it."""
    card = load_tiny("wan").card
    assert needs(card, Runtime(), nag=NAG()).working[DENOISING] > needs(card, Runtime()).working[DENOISING]


@pytest.mark.parametrize(("free", "asked", "chosen"), [
    (700, {}, ("none", "one")), (620, {}, ("model", "one")), (550, {}, ("none", "two")), (460, {}, ("model", "two")),
    (420, {}, ("block", "one")), (300, {}, ("block", "two")), (1, {}, ("block", "two")),
    (550, {"offload": "none"}, ("none", "two")), (550, {"guidance_calls": "one"}, ("block", "one")),
    (300, {"offload": "none"}, ("none", "two")), (550, {"compile": True}, ("none", "two")),
])  # fmt: skip
def test_auto_takes_what_the_free_memory_asks_for(
    free: int, asked: dict[str, Any], chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 350, of which 300 work at a time and 100 block by block; tensors of 300 in one call, 150 in two."""
    monkeypatch.setattr(running, "own_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free / 0.9 + 1, 0))
    monkeypatch.setattr(
        running, "needs",
        lambda card, runtime: Needs(
            weights={"text": 50, "denoiser": 300}, ends=20, block=40,
            working={READING: 0, DENOISING: {"one": 300, "two": 150}[runtime.guidance_calls], DECODING: 0},
        ),
    )  # fmt: skip
    options = Sample(student="world", device="cuda", dtype="float32", **asked)
    found = running.runtime_of(options, "world")
    assert (found.offload, found.guidance_calls) == chosen


def test_bfloat16_weights_are_planned_as_they_are_kept() -> None:
    model = load_tiny("wan", Runtime(dtype="bfloat16"))
    planned = needs(model.card, Runtime(dtype="bfloat16"))
    assert planned.weights["denoiser"] == sum(tensor.nbytes for tensor in model.denoiser.state_dict().values())
    assert planned.weights["denoiser"] < needs(model.card, Runtime()).weights["denoiser"]


def test_peaks_follow_from_what_is_on_the_device() -> None:
    made = Needs(
        weights={"text": 900, "denoiser": 500, "codec": 70}, ends=100, block=40,
        working={READING: 10, DENOISING: 300, DECODING: 600},
    )  # fmt: skip
    assert [made.total(READING, offload) for offload in get_args(Offload)] == [1480, 910, 10]
    assert [made.total(DENOISING, offload) for offload in get_args(Offload)] == [1770, 800, 100 + 2 * 40 + 300]
    assert [made.total(DECODING, offload) for offload in get_args(Offload)] == [2070, 670, 670]
    assert [made.peak(offload) for offload in get_args(Offload)] == [2070, 910, 670]


def test_ways_begin_with_what_was_asked_for_and_offload_only_to_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needing, "needs", lambda *_, **__: None)  # the ways alone are asked about
    card = read_card("world")
    here = [way.runtime for way in ways(card, Runtime())]
    assert (
        here[0] == Runtime() and {way.offload for way in here} == {"none"} and {way.device for way in here} == {"cpu"}
    )
    there = [way.runtime for way in ways(card, Runtime(device="cuda"))]
    assert [(way.offload, way.guidance_calls) for way in there[:6]] == [
        ("none", "one"), ("model", "one"), ("none", "two"), ("model", "two"), ("block", "one"), ("block", "two"),
    ] and there[0].dtype == "float32"  # fmt: skip
    assert {way.dtype for way in there} == {"float32", "bfloat16"}
    compiled = [way.runtime for way in ways(card, Runtime(device="cuda", compile=True, offload="model"))]
    assert {way.offload for way in compiled} == {"model"}
    assert {way.runtime.guidance_calls for way in ways(card, Runtime(guidance_calls="two"))} == {"two"}
    free = replace(card, contract=replace(card.contract, guidance=CFG()))
    assert {way.runtime.guidance_calls for way in ways(free, Runtime(device="cuda"))} == {"one"}


def test_the_stored_type_is_read_from_the_files(tmp_path: Path) -> None:
    wide = tiny_model().save(tmp_path / "wide")
    narrow = tiny_model().save(tmp_path / "narrow", dtype=torch.bfloat16)
    found = [stored_dtype(read_card(folder), str(folder)) for folder in (wide, narrow, "world")]
    assert found == ["float32", "bfloat16", "float32"]
    layout = shared("wan")
    assert stored_dtype(read_card(layout), str(layout)) == "float32"


@pytest.mark.parametrize(
    ("stored", "device", "dtype"),
    [(torch.bfloat16, "cuda", "bfloat16"), (torch.bfloat16, "cpu", "float32"), (torch.float32, "cuda", "float32")],
)
def test_auto_takes_the_stored_type_on_a_gpu(stored: torch.dtype, device: str, dtype: str, tmp_path: Path) -> None:
    folder = str(tiny_model().save(tmp_path / "tiny", dtype=stored))
    assert runtime_of(Sample(student=folder), folder, device=device) == Runtime(dtype=dtype, device=device)  # type: ignore[arg-type]
    asked = Sample(student=folder, dtype="float64", offload="none")
    assert runtime_of(asked, folder, device=device).dtype == "float64"


def test_a_dry_run_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model().save(tmp_path / "tiny")
    words = ["sample", str(folder), "--prompt", "a red ball", "--dry-run", "--output", str(tmp_path / "x.mp4")]
    assert main(words) == 0
    alone = capsys.readouterr().out
    assert "denoising" in alone and "nothing was loaded or written" in alone and "fit" not in alone
    assert main([*words, "--memory", "1GB"]) == 0
    assert "fits in 1,024.0 MiB" in capsys.readouterr().out
    peak = needs(read_card(folder), Runtime()).peak("none")
    assert main([*words, "--device", "cuda", "--memory", f"{0.9 * peak / 2**20}MB"]) == 0
    tight = capsys.readouterr().out
    assert "does not fit" in tight and "--offload model" in tight.splitlines()[-2] and "yes" in tight.splitlines()[-2]
    assert main([*words, "--memory", "0.001MB"]) == 0
    assert "none of these fits: make fewer or smaller clips" in capsys.readouterr().out
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.slow
def test_wan_fits_where_it_should(tmp_path: Path) -> None:
    """Clips of 81 frames of 480 x 832: the 14B model in 24 GiB, the 1.3B model in 8."""
    found: dict[str, Any] = {}
    for name, transformer, tiling in (("1.3b", published.WAN_13B, "tiles"), ("14b", published.WAN_14B, "auto")):
        card = read_card(published.wan(tmp_path / name, transformer))
        assert (card.num_frames, card.height, card.width) == (81, 480, 832)
        found[name] = needs(card, Runtime(dtype="bfloat16", tiling=tiling)).peak("block") / 2**30  # type: ignore[arg-type]
    assert found["1.3b"] < 8 and found["14b"] < 24, found
