"""How a model is run: in what numbers, where, and by which kernels; and that it says so or refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core import Rng
from fewstep.models import Card, VideoModel
from fewstep.models.card import allocate
from fewstep.models.runtime import Runtime
from fewstep.models.spec import Spec
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a small red ring", "a large blue disc")
HALF = Runtime(dtype="bfloat16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model().save(tmp_path / "tiny")


def test_bfloat16_is_autocast_with_half_the_matrices(folder: Path) -> None:
    """The same bits as float32 weights that are cast in every call; the ends, norms and latents are float32."""
    plain, half = VideoModel.from_pretrained(folder), VideoModel.from_pretrained(folder, runtime=HALF)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(PROMPTS)
    made = half(PROMPTS)
    assert torch.equal(made, expected) and not torch.equal(made, plain(PROMPTS))
    types = {name: weight.dtype for name, weight in half.denoiser.named_parameters()}
    assert {name for name, kind in types.items() if kind == torch.bfloat16} == {
        name for name in types if ".blocks." in name and name.endswith((".weight", ".bias"))
    }
    prediction = half.denoiser(*inputs(half))
    assert prediction.raw.dtype == prediction.x0.dtype == torch.float32


def inputs(model: VideoModel) -> tuple[Any, ...]:
    cond = model.text.encode(PROMPTS)
    return Rng(0).randn((2, *model.latent_shape()), "x"), torch.full((2,), 0.5), cond


def test_a_model_in_bfloat16_is_still_the_same_model(folder: Path) -> None:
    """Its fingerprint is that of the weights in its folder, and rounded weights are not written."""
    plain, half = VideoModel.from_pretrained(folder), VideoModel.from_pretrained(folder, runtime=HALF)
    later = VideoModel.from_pretrained(folder).to(torch.bfloat16)
    known = plain.fingerprint("denoiser")
    again = (half, later, later.with_card(name="other"), half.with_part("codec", half.codec))
    assert [model.fingerprint("denoiser") for model in again] == [known] * 4
    assert torch.equal(half(PROMPTS), later(PROMPTS))
    for model in (half, later):
        with pytest.raises(ValueError, match="runs in bfloat16, so its weights are rounded; load it without a runtime"):
            model.save(folder / "copy")
        with pytest.raises(ValueError, match="the weights are bfloat16 already; load the model again"):
            model.prepared(Runtime())


def test_networks_of_other_types_take_float32_latents(folder: Path) -> None:
    """A denoiser that somebody casts as a whole: its time keeps more than 8 bits, and its prediction is float32."""
    plain = VideoModel.from_pretrained(folder)
    truth = plain.denoiser(*inputs(plain)).raw
    for dtype, near in ((torch.bfloat16, 0.1), (torch.float64, 1e-5)):
        cast = VideoModel.from_pretrained(folder).denoiser.to(dtype)
        made = cast(*inputs(plain)).raw
        assert made.dtype == torch.float32 and not torch.equal(made, truth)
        assert (made - truth).norm() < near * truth.norm()


PEAKS = """
import sys
from fewstep.evaluate.latency import peak_memory
from fewstep.models.bundle import VideoModel
from fewstep.models.card import allocate
from fewstep.models.runtime import Runtime
kept = [VideoModel.from_pretrained(sys.argv[1])]  # what is imported late, and the allocator's own reserves
before, how = peak_memory(lambda: None)
for folder in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
        load = lambda: kept.append(VideoModel.from_pretrained(folder, runtime=Runtime(dtype=dtype)))
        after, _ = peak_memory(load)
        before, _ = peak_memory(lambda: print(how, ":", after - before))
"""


def test_loading_takes_no_more_than_what_is_loaded(tmp_path: Path) -> None:
    """A process holds the weights once, in the type in which they are run, and little else; files may have either type."""
    card = Card(name="large", parts={"denoiser": Spec("VideoDiT", {"width": 256, "depth": 12, "heads": 4})})
    network = VideoModel(card, {"denoiser": allocate("denoiser", card)})
    folders = [network.save(tmp_path / str(kind), dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    weights = sum(p.numel() for p in network.denoiser.parameters())
    made = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    if "since its start" in made.stdout:
        pytest.skip("this system tells the peak of a process' whole life only")
    peaks = [int(line.rpartition(":")[2]) / weights for line in made.stdout.splitlines()]
    assert all(peak < 1.35 * size for peak, size in zip(peaks, (4, 2, 4, 2), strict=True)), peaks
