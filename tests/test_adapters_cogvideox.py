"""CogVideoX in three parts: equal to diffusers' own forward and to its DDIM, with both kinds of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import CogVideoXDDIMScheduler

from fewstep.attention import KVCache
from fewstep.core import Cond, Rng
from fewstep.diffusion import Betas, Contract, ddim
from fewstep.models import Denoiser
from fewstep.models.adapters.cogvideox import CogVideoX
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from support_unets import awake

pytestmark = pytest.mark.usefixtures("single_thread")
SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
MODELS = {"2b": SMALL, "5b": SMALL | {"use_rotary_positional_embeddings": True}}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def network(config: dict[str, Any]) -> CogVideoX:
    torch.manual_seed(0)
    made: CogVideoX = awake(CogVideoX(config=config))
    return made


def inputs(frames: int = 3, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    cond = Cond(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 4, frames, height, width), torch.tensor([1.0, 0.251]), cond


@every_model
@pytest.mark.parametrize("size", [(3, 8, 12), (1, 8, 12), (4, 6, 4)], ids=str)
@torch.no_grad()
def test_forward_is_that_of_diffusers(config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """Bit for bit, at the trained size and others."""
    mine, (x, t, cond) = network(config), inputs(*size)
    assert torch.equal(mine(x, t, cond).raw, mine.original().forward(x, t, cond))


@torch.no_grad()
def test_ddim_is_that_of_cogvideox() -> None:
    """v-prediction from pure noise at t = 1: a table without zero SNR, or with another shift, would be visible."""
    theirs = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    mine = network(MODELS["2b"])
    denoiser = Denoiser(mine, path_of(theirs.config), kind_of(theirs.config))
    assert denoiser.path == Betas(zero_snr=True, snr_shift=3.0) and denoiser.kind == "v"
    x, _, cond = inputs()
    whole = mine.original().networks["transformer"]
    theirs.set_timesteps(5)
    expected = x
    for k in theirs.timesteps:
        made = whole(expected.transpose(1, 2), cond.text, k.expand(2)).sample.transpose(1, 2)
        expected = theirs.step(made, k, expected).prev_sample

    def sample(path: Betas, contract: Contract) -> Tensor:
        student = Denoiser(mine, path, "v")
        return ddim(lambda x, t: student(x, t, cond), path.prior(x), contract.times())

    contract = contract_of(theirs.config, steps=5, scale=6.0)
    torch.testing.assert_close(sample(denoiser.path, contract), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(Betas(), contract), expected, atol=1e-2)


def test_what_cogvideox_cannot_do_is_refused() -> None:
    mine, (x, t, cond) = network(MODELS["5b"]), inputs()
    with pytest.raises(ValueError, match="one time per clip"):
        mine(x, Rng(0).rand((2, 3), "t"), cond)
    with pytest.raises(ValueError, match="no cache"):
        mine(x, t, cond, KVCache.empty().view())
    with pytest.raises(ValueError, match="multiples of 2"):
        mine(x[..., :5], t, cond)
    with pytest.raises(ValueError, match="patch_size_t: 2"):
        CogVideoX(config=SMALL | {"patch_size_t": 2})
