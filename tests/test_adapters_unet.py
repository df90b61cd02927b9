"""U-Nets of diffusers in three parts: equal to diffusers' own forward, and whole under everything that looks inside."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from fewstep.core import Call, Cond, KVView, Rng
from fewstep.core.call import Causal
from fewstep.diffusion import Betas
from fewstep.models import Denoiser, FeatureHeads
from fewstep.models.adapters.unets.animatediff import AnimateDiff
from fewstep.models.adapters.unets.stable_diffusion import StableDiffusion
from fewstep.models.adapters.unets.unet import UNet, to_images
from fewstep.models.lora import Lora, adapt, adapters
from fewstep.models.spread import Spread
from support_unets import IMAGE, VIDEO, awake

FAMILIES: dict[type[UNet], dict[str, Any]] = {AnimateDiff: VIDEO, StableDiffusion: IMAGE}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)

NO_PAST = Call(kv=KVView((), torch.empty(0, dtype=torch.long), torch.zeros((), dtype=torch.long)))


def pair(family: type[UNet]) -> tuple[UNet, nn.Module]:
    """An adapter and diffusers' own network with the same weights, none of them zero."""
    torch.manual_seed(0)
    theirs = awake(family.network.from_config(FAMILIES[family]))
    mine = family(config=FAMILIES[family]).eval()
    weights = theirs.state_dict()
    mine.load_state_dict({name: weights[mine.foreign(name)] for name in mine.state_dict()})
    return mine, theirs


def inputs(frames: int = 3, height: int = 8, width: int = 12, batch: int = 2) -> tuple[Tensor, Tensor, Cond]:
    torch.manual_seed(1)
    cond = Cond(torch.randn(batch, 5, 12), torch.ones(batch, 5, dtype=torch.bool))
    return torch.randn(batch, 4, frames, height, width), torch.tensor([1.0, 0.251])[:batch], cond


def reference(theirs: nn.Module, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """diffusers' own forward on clips."""
    frames = x.shape[2]
    text = text.repeat_interleave(frames, 0)
    if "motion_num_attention_heads" in theirs.config:
        return theirs(x, timesteps, text).sample
    made = theirs(to_images(x), timesteps.repeat_interleave(frames, 0), text).sample
    return made.unflatten(0, (-1, frames)).transpose(1, 2)


def denoiser(family: type[UNet]) -> Denoiser:
    return Denoiser(pair(family)[0], Betas(), "eps")


def far(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4)


@every_family
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 12), (4, 16, 4)], ids=str)
@torch.no_grad()
def test_forward_is_that_of_diffusers(family: type[UNet], size: tuple[int, int, int]) -> None:
    """Bit for bit, where diffusers is given as much at once; timesteps 999 and 250 are the times 1 and 0.251."""
    mine, theirs = pair(family)
    x, t, cond = inputs(*size)
    expected = reference(theirs, x, torch.tensor([999, 250]), cond.text)
    made = mine(x, t, cond).raw
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert torch.equal(made, expected) or (family is StableDiffusion and x.shape[2] > 1)  # embeds a time per image
    assert far(mine(x, t - 0.01, cond).raw, expected)
    assert far(mine(x, t, Cond(cond.text.roll(1, 0), cond.mask)).raw, expected)


@every_family
def test_names_are_those_of_diffusers(family: type[UNet]) -> None:
    mine, theirs = pair(family)
    assert {mine.foreign(name) for name in mine.state_dict()} == set(theirs.state_dict())
    assert len(mine.state_dict()) == len(theirs.state_dict())


@torch.no_grad()
def test_only_the_video_network_sees_other_frames() -> None:
    x, t, cond = inputs()
    other = x.clone()
    other[:, :, 2] += 1
    for family, sees in ((AnimateDiff, True), (StableDiffusion, False)):
        mine = pair(family)[0]
        before, after = mine(x, t, cond).raw, mine(other, t, cond).raw
        assert far(before[:, :, 0], after[:, :, 0]) == sees
        assert far(before[:, :, 2], after[:, :, 2])
        torch.testing.assert_close(mine(x[1:], t[1:], cond[1:]).raw, before[1:], atol=1e-5, rtol=0)


@every_family
def test_features_at_every_scale(family: type[UNet]) -> None:
    network, (x, t, cond) = denoiser(family), inputs()
    layers = list(range(len(network.backbone.blocks)))
    x.requires_grad_()
    volumes = network.features(x, t, cond, layers)
    sizes = [(4, 6), (2, 3), (2, 3), (2, 3), (4, 6), (8, 12), (8, 12)]
    assert [tuple(v.shape) for v in volumes] == [
        (2, width, 3, *size) for width, size in zip(network.backbone.widths, sizes, strict=True)
    ]
    heads = FeatureHeads([network.backbone.widths[layer] for layer in (0, 1, 3)], (0, 1, 3))
    heads(network.features(x, t, cond, heads.layers)).sum().backward()
    assert x.grad is not None and x.grad.any()
    whole = network.backbone.head(list(network.backbone.walk(network.backbone.embed(x, t, cond)))[-1])
    assert torch.equal(whole, network(x, t, cond).raw)


@every_family
def test_checkpointing_changes_no_gradient(family: type[UNet]) -> None:
    network, (x, t, cond) = pair(family)[0], inputs()
    found = []
    for checkpointing in (False, True):
        network.zero_grad()
        network(x, t, cond, Spread(checkpointing=checkpointing)(Call())).raw.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@every_family
def test_derivatives_are_those_of_finite_differences(family: type[UNet]) -> None:
    network, (x, _, cond) = denoiser(family).double(), inputs()
    x, cond = x.double(), Cond(cond.text.double(), cond.mask)
    t, dx, dt = torch.tensor([0.8004, 0.2502]).double(), torch.randn_like(x), torch.tensor([1.0, 0.5]).double()
    _, tangent = network.jvp(x, t, cond, dx, dt)
    h = 1e-5  # time features are float32, so a smaller step would see their rounding
    with torch.no_grad():
        ahead, behind = (network(x + e * dx, t + e * dt, cond).raw for e in (h, -h))
    torch.testing.assert_close(tangent.raw, (ahead - behind) / (2 * h), atol=1e-2, rtol=1e-2)


@every_family
@torch.no_grad()
def test_bfloat16_arithmetic_is_near(family: type[UNet]) -> None:
    network, (x, t, cond) = pair(family)[0], inputs()
    exact = network(x, t, cond).raw
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t, cond).raw
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.03 * exact.norm()


@every_family
def test_blocks_compile_without_graph_breaks(family: type[UNet]) -> None:
    network, (x, t, cond) = pair(family)[0], inputs(frames=2, height=4, width=4)
    eager = network(x, t, cond).raw
    for index in (0, len(network.blocks) // 2, -1):  # one of each kind
        network.blocks[index].compile(fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(network(x, t, cond).raw, eager)


@every_family
def test_a_copy_is_independent_and_adapters_go_on_every_attention(family: type[UNet]) -> None:
    network, (x, t, cond) = denoiser(family), inputs()
    before, twin = network(x, t, cond).raw, copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(network(x, t, cond).raw, before)
    student = adapt(network, Lora(rank=2, targets=("to_q", "to_v")), Rng(0))
    assert torch.equal(student(x, t, cond).raw, before)
    names = adapters(student)
    assert any("attentions" in name for name in names)
    assert any("motion_modules" in name for name in names) == (family is AnimateDiff)


@every_family
def test_arguments_are_plain_and_build_the_same_network(family: type[UNet]) -> None:
    mine, _ = pair(family)
    again = family(**json.loads(json.dumps(mine.args)))
    assert again.args == mine.args
    again.load_state_dict(mine.state_dict())
    with torch.device("meta"):
        assert next(family(**mine.args).parameters()).is_meta


@every_family
def test_what_a_unet_cannot_do_is_refused(family: type[UNet]) -> None:
    mine, (x, t, cond) = pair(family)[0], inputs()
    with pytest.raises(ValueError, match=r"one time per clip: t must be \[2\]"):
        mine(x, t[:, None].expand(-1, 3), cond)
    with pytest.raises(ValueError, match="multiples of 4"):
        mine(x[..., :6], t, cond)
    with pytest.raises(ValueError, match="no cache"):
        mine(x, t, cond, NO_PAST)
    with pytest.raises(ValueError, match="not chunks; call it without causal"):
        mine(x, t, cond, Call(causal=Causal((1, 2))))
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    with pytest.raises(ValueError, match="addition_embed_type: 'text_time' cannot be read"):
        family(config=FAMILIES[family] | extra | {"projection_class_embeddings_input_dim": 60})


def test_a_clip_longer_than_the_motion_modules_know_is_refused() -> None:
    with pytest.raises(ValueError, match="positions of 8 frames"):
        pair(AnimateDiff)[0](*inputs(frames=9))
