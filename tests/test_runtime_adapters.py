"""How models of the diffusers ecosystem are run: in bfloat16, by the reference, and decoded in tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from fewstep.models import VideoModel
from fewstep.models.fingerprint import describe
from fewstep.models.runtime import Runtime, effective
from fewstep.models.source import Diffusers
from support_unets import animatediff
from tiny_models import TINY, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ("a red ball",)
HALF = Runtime(dtype="bfloat16")


def loaded(name: str, runtime: Runtime = Runtime(), **options: Any) -> VideoModel:
    source = Diffusers(source=str(shared(name)), **TINY[name].size | options)
    return VideoModel.load(source.card(), source.source, runtime=runtime)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_autocast_for_every_family(name: str) -> None:
    """Read tensor by tensor or as a whole; and the fingerprint is that of the weights in the folder."""
    plain, half = loaded(name), loaded(name, HALF)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain.latents(PROMPTS, num_inference_steps=2, force=True)
    assert torch.equal(half.latents(PROMPTS, num_inference_steps=2, force=True), expected)
    assert half.fingerprint("denoiser") == plain.fingerprint("denoiser")
    sizes = [sum(p.nbytes for p in model.denoiser.backbone.blocks.parameters()) for model in (plain, half)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", ["wan", "wan_experts", "ltx"])
def test_a_denoiser_that_is_cast_as_a_whole_samples(name: str) -> None:
    model = loaded(name)
    expected = model.latents(PROMPTS, num_inference_steps=2, force=True)
    model.denoiser.to(torch.bfloat16)
    made = model.latents(PROMPTS, num_inference_steps=2, force=True)
    assert made.dtype == torch.float32 and not torch.equal(made, expected)
    assert (made - expected).norm() < 0.1 * expected.norm()


def test_a_unet_runs_in_bfloat16_and_has_no_reference(tmp_path: Path) -> None:
    animatediff().save_pretrained(tmp_path)
    options: dict[str, Any] = {"num_frames": 2, "height": 16, "width": 16}
    source = Diffusers(source=str(tmp_path), **options)
    half = VideoModel.load(source.card(), source.source, runtime=HALF)
    with torch.autocast("cpu", torch.bfloat16):
        expected = source.load().latents(PROMPTS, num_inference_steps=2, force=True)
    assert torch.equal(half.latents(PROMPTS, num_inference_steps=2, force=True), expected)
    with pytest.raises(ValueError, match="those of its library, which have no reference; choose auto or sdpa-math"):
        half.prepared(Runtime(dtype="bfloat16", attention="reference"))


def test_tiles_are_no_part_of_a_model() -> None:
    """The codec is as its card says, however it decodes; and where the card says tiles, they can be left out."""
    model, tiled = loaded("wan"), loaded("wan", tiling=True)
    known = describe(model.codec), describe(tiled.codec)
    prints = model.fingerprint("codec"), tiled.fingerprint("codec")
    assert [effective(m)["decoding"] for m in (model, tiled)] == ["whole", "tiles"]
    model.prepared(Runtime(tiling="tiles")), tiled.prepared(Runtime(tiling="whole"))
    assert [effective(m)["decoding"] for m in (model, tiled)] == ["tiles", "whole"]
    assert (describe(model.codec), describe(tiled.codec)) == known
    assert (model.fingerprint("codec"), tiled.fingerprint("codec")) == prints
    with pytest.raises(ValueError, match="does not decode chunks in tiles"):
        model.codec.decode_next(torch.zeros(1, *model.latent_shape()))
