"""CogVideoX in three parts: equal to diffusers' own forward and to its DDIM, with both kinds of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from bench_unets import awake
from fewstep.attention import KVCache
from fewstep.core import Cond, Rng
from fewstep.diffusion import Betas, Contract, ddim
from fewstep.models import Denoiser
from fewstep.models.adapters.cogvideox import CogVideoX
from fewstep.models.adapters.ddpm import contract_of, kind_of, path_of
from fewstep.models.spec import Spec

pytestmark = pytest.mark.usefixtures("single_thread")
SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
MODELS = {"2b": SMALL, "5b": SMALL | {"use_rotary_positional_embeddings": True}}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def pair(config: dict[str, Any]) -> tuple[CogVideoX, nn.Module]:
    torch.manual_seed(0)
    theirs = awake(CogVideoXTransformer3DModel(**config))
    mine, weights = CogVideoX(config=config).eval(), theirs.state_dict()
    assert {mine.foreign(name) for name in mine.state_dict()} == weights.keys()
    mine.load_state_dict({name: weights[mine.foreign(name)] for name in mine.state_dict()})
    return mine, theirs


def inputs(frames: int = 3, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    cond = Cond(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 4, frames, height, width), torch.tensor([1.0, 0.251]), cond


def reference(theirs: nn.Module, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """diffusers' own forward, with positions as its pipeline makes them."""
    rotary = None
    if theirs.config.use_rotary_positional_embeddings:
        pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
        pipeline.__dict__.update(transformer=theirs, vae_scale_factor_spatial=8)
        _, _, frames, height, width = x.shape
        rotary = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, torch.device("cpu"))
    return theirs(x.transpose(1, 2), text, timesteps, image_rotary_emb=rotary).sample.transpose(1, 2)


@every_model
@pytest.mark.parametrize("size", [(3, 8, 12), (1, 8, 12), (4, 6, 4)], ids=str)
@torch.no_grad()
def test_forward_is_that_of_diffusers(config: dict[str, Any], size: tuple[int, int, int]) -> None:
    """Bit for bit, at the trained size and others."""
    mine, theirs = pair(config)
    x, t, cond = inputs(*size)
    assert torch.equal(mine(x, t, cond).raw, reference(theirs, x, torch.tensor([999, 250]), cond.text))


@every_model
def test_what_looks_inside_finds_its_way(config: dict[str, Any]) -> None:
    """Features, checkpointing, forward-mode derivatives, one graph per block, arguments as plain values."""
    network, (x, t, cond) = Denoiser(pair(config)[0], Betas(zero_snr=True), "v"), inputs()
    assert [v.shape for v in network.features(x, t, cond, (0, -1))] == [(2, 32, 3, 4, 6)] * 2
    found = []
    for checkpointing in (False, True):
        network.backbone.spread(None, checkpointing)
        network.zero_grad()
        network(x, t, cond).raw.square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] if found[0][name] is not None)
    dx, dt, h = torch.randn_like(x), torch.ones(2), 1e-4
    with torch.no_grad():
        _, tangent = network.jvp(x, 0.9 * t, cond, dx, dt)
        ahead, behind = (network(x + s * h * dx, 0.9 * t + s * h * dt, cond).raw for s in (1, -1))
    difference = (ahead - behind) / (2 * h)
    assert (tangent.raw - difference).norm() < 0.02 * difference.norm()
    state = network.backbone.embed(x, t, cond)
    block = network.backbone.blocks[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(state).x_BNE, block(state).x_BNE)
    again = Spec.of(network.backbone).build()
    again.load_state_dict(network.backbone.state_dict())


@torch.no_grad()
def test_ddim_is_that_of_cogvideox() -> None:
    """v-prediction from pure noise at t = 1: a table without zero SNR, or with another shift, would be visible."""
    theirs = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    mine, network = pair(MODELS["2b"])
    denoiser = Denoiser(mine, path_of(theirs.config), kind_of(theirs.config))
    assert denoiser.path == Betas(zero_snr=True, snr_shift=3.0) and denoiser.kind == "v"
    x, _, cond = inputs()
    theirs.set_timesteps(5)
    expected = x
    for k in theirs.timesteps:
        expected = theirs.step(reference(network, expected, k.expand(2), cond.text), k, expected).prev_sample

    def sample(path: Betas, contract: Contract) -> Tensor:
        student = Denoiser(mine, path, "v")
        return ddim(lambda x, t: student(x, t, cond), path.prior(x), contract.times())

    contract = contract_of(theirs.config, steps=5, scale=6.0)
    torch.testing.assert_close(sample(denoiser.path, contract), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(Betas(), contract), expected, atol=1e-2)


def test_what_cogvideox_cannot_do_is_refused() -> None:
    mine, (x, t, cond) = pair(MODELS["5b"])[0], inputs()
    with pytest.raises(ValueError, match="one time per clip"):
        mine(x, Rng(0).rand((2, 3), "t"), cond)
    with pytest.raises(ValueError, match="no cache"):
        mine(x, t, cond, KVCache.empty().view())
    with pytest.raises(ValueError, match="multiples of 2"):
        mine(x[..., :5], t, cond)
    with pytest.raises(ValueError, match="patch_size_t: 2"):
        CogVideoX(config=SMALL | {"patch_size_t": 2})
