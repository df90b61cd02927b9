"""What sampling a model is: the contract's sampler, from the path's own noise of each clip's seed, guided as the card says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.core import Call, Seeds
from fewstep.diffusion import CFG, EDM, Contract, Heun, Prediction
from fewstep.models import VideoModel
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a small red ring", "a large blue disc")


@torch.no_grad()
def test_a_clip_is_the_samplers_from_its_own_noise_guided_by_the_card() -> None:
    tiny = tiny_model(path=EDM(sigma_max=5.0), kind="eps")
    contract = Contract(sampler=Heun(), steps=2, guidance=CFG(scale=2.5))
    model = VideoModel(replace(tiny.card, contract=contract, negative_prompt="a grey box"), tiny.parts)
    made = model.latents(PROMPTS, seed=5)
    cond, negative = model.text.encode(PROMPTS), model.text.encode(["a grey box", "a grey box"])

    def guided(x: torch.Tensor, t: torch.Tensor, call: Call) -> Prediction:
        plain, free = model.denoiser(x, t, cond), model.denoiser(x, t, negative)
        return plain.with_raw(free.raw + 2.5 * (plain.raw - free.raw))

    noise = Seeds((5, 6))
    start = 5.0 * noise.randn((2, *model.latent_shape()), "start")  # sigma_max
    expected = Heun()(guided, start, (1.0, 0.5, 0.0), rng=noise)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(model.latents([prompt], seed=5 + row)[0], made[row], rtol=1e-4, atol=1e-4)
    chosen = model.latents(PROMPTS, seed=(6, 5))
    assert not torch.allclose(chosen, made, atol=1e-2)
