"""Students of phases in files of others: a Wan with two experts is a Wan 2.2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import WanPipeline

from fewstep import VideoModel
from fewstep.compress import Experts
from fewstep.core import Seeds
from fewstep.diffusion import DDIM, Contract, Exact
from fewstep.engine.phases import boundaries_of
from fewstep.models.experts import Experts as ByTime
from fewstep.models.source import Diffusers
from support_engine import shaken
from tiny_models import TINY, shared

pytestmark = pytest.mark.usefixtures("single_thread")
TIMES = (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0)
PROMPT = ["a red ball"]


def student(*boundaries: float) -> VideoModel:
    source = Diffusers(
        source=str(shared("wan")),
        text_dtype="float32",
        transforms=(Experts(boundaries=boundaries),),
        **TINY["wan"].size,
    )
    model = source.load()
    network = model.denoiser.backbone
    assert isinstance(network, ByTime)
    shaken(network.experts[1])
    contract = Contract(sampler=DDIM(), grid=Exact(grids=(TIMES,)), steps=4)
    return model.with_part("denoiser", model.denoiser, role="student", contract=contract)


def test_diffusers_samples_it_as_wan_2_2(tmp_path: Path) -> None:
    model = student(0.9)
    assert model.card.parts["denoiser"].type == "Wan"
    ours = model.latents(PROMPT, seed=3)
    folder = model.export(tmp_path / "pair")
    back = VideoModel.from_pretrained(folder)
    assert back.card.parts["denoiser"].type == "WanExperts"
    assert not back.card.transforms
    assert torch.equal(back.latents(PROMPT, seed=3), ours)
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.boundary_ratio == 0.9
    start = Seeds((3,)).randn((1, *model.latent_shape()), "start")
    size = {"num_frames": model.card.num_frames, "height": model.card.height, "width": model.card.width}
    length = model.card.parts["text"].args["length"]
    made = pipe(
        PROMPT, latents=start, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
        max_sequence_length=length, **size,
    )[0]  # fmt: skip
    torch.testing.assert_close(made, ours, atol=1e-4, rtol=1e-4)


def test_three_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformed \(Experts\), and only fewstep knows how to build it"):
        student(0.9, 0.7).export(tmp_path / "three")


def test_wan_2_2_has_its_experts_already() -> None:
    source = Diffusers(source=str(shared("wan_experts")), text_dtype="float32", **TINY["wan_experts"].size)
    assert boundaries_of(source.card()) == (0.6,)
    assert boundaries_of(student(0.9, 0.7).card) == (0.9, 0.7)
    assert boundaries_of(Diffusers(source=str(shared("wan")), text_dtype="float32", **TINY["wan"].size).card()) == ()
