"""Spatiotemporal guidance: its formula, the network whose blocks do not mix tokens, and who refuses it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import Operation, Site
from fewstep.caching import SkipMiddle
from fewstep.core import Call, Cond, Rng, dump
from fewstep.core.build import build
from fewstep.core.call import Constants
from fewstep.data.pairs import Course
from fewstep.diffusion import CFG, NAMED, STG, Contract, Euler, Heun, Prediction, RectifiedFlow
from fewstep.methods import DMD2
from fewstep.models import Denoiser, VideoDiT, VideoModel
from fewstep.models.source import Diffusers
from support_engine import shaken, tiny_model
from tiny_models import TINY, shared

pytestmark = pytest.mark.usefixtures("single_thread")
B, SHAPE = 3, (4, 2, 4, 4)


def conds(width: int = 16, count: int = B) -> tuple[Cond, Cond]:
    return tuple(Cond(Rng(0).randn((count, 5, width), name), torch.ones(count, 5, dtype=torch.bool)) for name in "pn")  # type: ignore[return-value]


# --- the formula ------------------------------------------------------------------------------------------------------


class Known:
    """A network whose answers to the prompt, to the negative prompt and for the perturbed call are given, in float64."""

    def __init__(self) -> None:
        make = partial(Rng(1).randn, (B, *SHAPE))
        self.cond, self.uncond, self.perturbed = (
            (scale * make(name)).double() + shift
            for name, scale, shift in (("c", 1.0, 0.0), ("u", 0.5, 0.1), ("p", 2.0, -0.2))
        )
        self.calls: list[Call] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call(), /) -> Prediction:
        self.calls.append(call)
        both = torch.cat([self.cond, self.uncond])
        raw = {"cond": self.cond, "uncond": self.uncond, "both": both, "perturbed": self.perturbed}[call.branch]
        assert len(x_t) == len(raw) == len(cond)
        return Prediction(raw, "flow", x_t, t, RectifiedFlow())


def guided(guidance: CFG, net: Known, **options: Any) -> Tensor:
    x, t = torch.zeros(B, *SHAPE, dtype=torch.float64), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    return guidance(net, x, t, *conds(), **options).raw


@pytest.mark.parametrize("calls", ["one", "two"])
def test_the_result_is_the_authors_formula(calls: Any) -> None:
    net, guidance = Known(), STG(scale=3.0, stg_scale=1.5, blocks=(7, 2), rescale=0.7, low=0.4)
    made = guided(guidance, net, calls=calls)
    for row, scale in enumerate((3.0, 3.0, 1.0)):  # the last clip's time is outside the interval
        c, u, p = net.cond[row], net.uncond[row], net.perturbed[row]
        raw = u + scale * (c - u) + 1.5 * (c - p)
        factor = 0.7 * c.std() / raw.std() + 0.3
        torch.testing.assert_close(made[row], raw * factor, rtol=1e-12, atol=1e-12)
    assert [(call.branch, call.unmixed) for call in net.calls][-1] == ("perturbed", (7, 2))
    assert all(call.unmixed == () for call in net.calls[:-1]) and len(net.calls) == {"one": 2, "two": 3}[calls]


def test_the_rest_of_a_call_goes_to_the_perturbed_one() -> None:
    net, constants = Known(), Constants()
    guided(STG(), net, call=Call(step=2, steps=5, constants=constants))
    perturbed = net.calls[-1]
    assert (perturbed.step, perturbed.steps, perturbed.constants) == (2, 5, constants)


@pytest.mark.parametrize("calls", ["one", "two"])
def test_strength_0_is_plain_guidance_bit_for_bit(calls: Any) -> None:
    ours, theirs = Known(), Known()
    made = guided(STG(scale=3.0, stg_scale=0.0, low=0.2, outside=1.5), ours, calls=calls)
    assert torch.equal(made, guided(CFG(scale=3.0, low=0.2, outside=1.5), theirs, calls=calls))
    assert ours.calls == theirs.calls and not STG(scale=1.0, stg_scale=0.0).active


def test_without_a_scale_the_negative_prompt_is_not_called() -> None:
    net = Known()
    made = guided(STG(scale=1.0, stg_scale=2.0, rescale=0.0), net)
    torch.testing.assert_close(made, net.cond + 2 * (net.cond - net.perturbed), rtol=1e-12, atol=1e-12)
    assert [call.branch for call in net.calls] == ["cond", "perturbed"]


def test_full_rescaling_keeps_the_standard_deviation_of_each_clip() -> None:
    net = Known()
    made = guided(STG(scale=4.0, rescale=1.0), net).flatten(1).std(1)
    torch.testing.assert_close(made, net.cond.flatten(1).std(1), rtol=1e-12, atol=0)


def test_three_evaluations_per_step_are_counted() -> None:
    three = STG(scale=3.0)
    assert [g.passes for g in (CFG(), CFG(scale=3.0), three, STG(), STG(scale=3.0, stg_scale=0.0))] == [1, 2, 3, 2, 2]
    assert Contract(guidance=three).calls(5) == 15 and Contract(guidance=three, sampler=Heun()).calls(5) == 27
    assert Course(Euler(), (1.0, 0.5, 0.0), three).nfe == 6
    work = {work.role: work.forwards for work in DMD2(guidance=three).cost()}
    assert work["teacher"] == 3


def test_cards_and_scales_keep_it() -> None:
    contract = Contract(guidance=STG(scale=3.0, stg_scale=0.5, blocks=(1, 4)))
    names = {cls.__name__: cls for cls in NAMED}
    assert build(Contract, json.loads(json.dumps(dump(contract))), names) == contract
    assert contract.guidance.rescaled(5.0) == STG(scale=5.0, stg_scale=0.5, blocks=(1, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": ()}, "at least one block, each named once"),
        ({"blocks": (3, 3)}, "at least one block, each named once"),
        ({"stg_scale": -1.0}, "stg_scale must be at least 0"),
        ({"rescale": 1.5}, "rescale must be at most 1"),
        ({"blocks": (-1,)}, "blocks.* must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STG(**fields)


# --- the network ------------------------------------------------------------------------------------------------------


class Values(Operation):
    """The reference: each token gets its own values."""

    def mask(self, q_BHND: Tensor, k_BHMD: Tensor, site: Site) -> Tensor:
        raise AssertionError("nobody asks")

    def forward(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, site: Site) -> Tensor:
        return v_BHMD


def dit(depth: int = 3) -> Denoiser:
    torch.manual_seed(0)
    network = VideoDiT(channels=4, width=24, depth=depth, heads=2, text_width=16)
    return shaken(Denoiser(network, RectifiedFlow(), "flow")).eval()  # type: ignore[return-value]


def tiny(name: str) -> VideoModel:
    """A family's tiny model, at its tiny size."""
    return Diffusers(source=str(shared(name)), text_dtype="float32", **TINY[name].size).load()


def example(name: str) -> tuple[Denoiser, Tensor, Cond]:
    """A network of two blocks or more, noise and a condition for two samples."""
    if name == "dit":
        return dit(), Rng(0).randn((2, *SHAPE), "x"), conds(count=2)[0]
    model = tiny(name)
    with torch.no_grad():
        cond, _ = model.conditions(["a cat", "two dogs"], guided=True)
    return shaken(model.denoiser).eval(), Rng(0).randn((2, *model.latent_shape()), "x"), cond  # type: ignore[return-value]


def seats(denoiser: Denoiser, layer: int) -> list[nn.Module]:
    """The modules of a block that hold its self-attention's operation."""
    return [module for module in denoiser.backbone.blocks[layer].modules() if hasattr(module, "operation")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "ltx", "wan", "wan_experts"])
def test_an_unmixed_block_gives_each_token_its_own_values(name: str) -> None:
    """Bit for bit as with an operation that returns them; the blocks before it are as they were."""
    denoiser, x, cond = example(name)
    t, layer = torch.tensor([0.95, 0.3]), len(denoiser.backbone.blocks) - 1
    call = Call(branch="perturbed", unmixed=(layer,))
    plain, perturbed = denoiser(x, t, cond).raw, denoiser(x, t, cond, call).raw
    before = [denoiser.features(x, t, cond, range(layer), each) for each in (Call(), call)]
    assert all(torch.equal(a, b) for a, b in zip(*before, strict=True)) and (layer == 0 or before[0])
    for seat in seats(denoiser, layer):
        seat.operation = Values()
    assert torch.equal(perturbed, denoiser(x, t, cond).raw)
    assert float((perturbed - plain).norm() / plain.norm()) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_it_is_diffusers_network_with_attention_left_out(name: str) -> None:
    """An attention processor that gives what the layer's values become, in diffusers' own forward."""

    class Unmixed:
        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))

    denoiser, x, cond = example(name)
    t = torch.tensor([0.8, 0.4])
    ours = denoiser(x, t, cond, Call(unmixed=(1,))).raw
    original = denoiser.backbone.original()
    assert original is not None
    (network,) = original.networks.values()
    first, second = (block.attn1 for block in (network.transformer_blocks if name == "ltx" else network.blocks)[:2])  # type: ignore[union-attr, index]
    second.processor = Unmixed()
    assert first.processor is not second.processor
    theirs = original.forward(x, t, cond)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((denoiser(x, t, cond).raw - theirs).norm() / theirs.norm()) > 1e-5


@torch.no_grad()
def test_other_blocks_mix_as_ever() -> None:
    denoiser, x, cond = example("dit")
    asked: list[int] = []
    for layer in range(3):
        (seat,) = seats(denoiser, layer)
        seat.operation.register_forward_pre_hook(lambda *_, layer=layer: asked.append(layer))  # type: ignore[union-attr, operator]
    denoiser(x, torch.ones(2), cond, Call(unmixed=(0, 2)))
    assert asked == [1]


@torch.no_grad()
def test_compiled_blocks_may_be_unmixed() -> None:
    denoiser, x, cond = example("dit")
    call, t = Call(unmixed=(1,)), torch.ones(2)
    eager = [denoiser(x, t, cond, each).raw for each in (Call(), call)]
    denoiser.backbone.blocks[1].compile(fullgraph=True, dynamic=False, backend="eager")
    for each, expected in zip((Call(), call, Call()), (*eager, eager[0]), strict=True):
        torch.testing.assert_close(denoiser(x, t, cond, each).raw, expected)


@torch.no_grad()
def test_what_a_run_keeps_is_right_for_the_perturbed_call() -> None:
    """Words and tables that are computed once, and a cache that replays blocks, keep the branches apart."""
    model = tiny_model()
    stg = STG(scale=2.0, blocks=(1,))
    card = replace(model.card, contract=replace(model.card.contract, guidance=stg))
    model = VideoModel(card, model.parts)
    kept = model.latents(["a red ball"], seed=1)
    cond, uncond = model.conditions(["a red ball"], guided=True)
    start = model.denoiser.path.prior(Rng(0).randn((1, *model.latent_shape()), "start"), 1.0)
    plain, times = partial(stg, model.denoiser), card.contract.times()
    step = Euler()
    with_constants, without = (
        step(lambda x, t, call, c=c: plain(x, t, cond, uncond, replace(call, constants=c)), start, times, rng=Rng(0))  # type: ignore[misc]
        for c in (Constants(), None)
    )
    assert torch.equal(with_constants, without) and kept.isfinite().all()
    runner = SkipMiddle(every=2, first=0, last=0).begin()
    step(lambda x, t, call: plain(x, t, cond, uncond, replace(call, runner=runner)), start, times, rng=Rng(0))
    assert {branch for branch, _ in runner.added} == {"both", "perturbed"}  # type: ignore[attr-defined]


# --- who refuses it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan"])
def test_networks_whose_attention_is_not_apart_refuse(name: str) -> None:
    denoiser, x, cond = example(name)
    with pytest.raises(ValueError, match="replaces the self-attention of single blocks, which a .* has not apart"):
        STG(scale=3.0, blocks=(0,))(denoiser, x, torch.ones(2), cond, cond)


def test_blocks_that_are_not_there_are_named() -> None:
    denoiser, x, cond = example("dit")
    with pytest.raises(ValueError, match=r"this VideoDiT has the blocks 0 to 2, and \[3, 19\] were asked for"):
        STG(blocks=(3, 1, 19))(denoiser, x, torch.ones(2), cond, cond)


def test_streams_are_refused() -> None:
    from fewstep.attention import KVCache

    denoiser, x, cond = example("dit")
    view = denoiser.recall(KVCache(), x)
    with pytest.raises(ValueError, match="for whole clips, not for streams"):
        STG(scale=3.0, blocks=(0,))(denoiser, x, torch.ones(2), cond, cond, Call(kv=view))


def test_export_refuses_what_pipelines_do_not_do(tmp_path: Path) -> None:
    model = tiny("ltx")
    contract = replace(model.card.contract, guidance=STG(scale=3.0, blocks=(1,)))
    model = VideoModel(replace(model.card, contract=contract), model.parts)
    with pytest.raises(ValueError, match="diffusers guides at all times with a scale above 1"):
        model.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
