"""Transforms of networks: each is a description from which the same network is built, on any device; what it claims holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.attention import BlockCausal
from fewstep.compress import (
    TRANSFORMS,
    Branches,
    Experts,
    FlowHead,
    FrameInput,
    Int8,
    Pruned,
    Repatterned,
    ScalarInput,
    StepScales,
    Transform,
    transformed,
)
from fewstep.compress.branches import Branched
from fewstep.compress.int8 import Int8Linear, quantise
from fewstep.compress.linear import chosen, linears
from fewstep.compress.scalar_input import Scalar
from fewstep.compress.stepwise import StepLinear
from fewstep.core import Call, Cond, RecipeError, Rng, build, dump
from fewstep.models import Denoiser, VideoDiT, VideoModel, fingerprint
from fewstep.models.bundle import read_card
from fewstep.models.card import sketch
from fewstep.models.source import Pretrained, Scratch
from fewstep.models.spec import Spec
from fewstep.world.checker import Checker, read_scenes
from fewstep.world.grammar import world_prompts
from fewstep.written import names
from support_engine import FRAMES, shaken, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
CASES: Mapping[str, Transform] = {
    "Int8": Int8(),
    "Branches": Branches(),
    "Int8-some": Int8(targets=("mlp.up", "qkv"), keep=("blocks.0.mlp.up",)),
    "Pruned": Pruned(blocks=(1,)),
    "Pruned-none": Pruned(),
    "Experts": Experts(boundaries=(0.5,)),
    "Experts-three": Experts(boundaries=(0.8, 0.1)),
    "ScalarInput": ScalarInput(name="guidance", scale=10.0),
    "ScalarInput-default": ScalarInput(name="until", default=0.5),
    "FrameInput": FrameInput(name="keys", width=2, words=("left", "right")),
    "FrameInput-window": FrameInput(name="beat", default=0.0, back=2, ahead=1),
    "Repatterned": Repatterned(pattern=BlockCausal(chunk=1)),
    "StepScales": StepScales(steps=3),
    "FlowHead": FlowHead(blocks=1, steps=2),
    "FlowHead-three": FlowHead(blocks=1, steps=3),
    "StepScales-some": StepScales(steps=2, targets=("mlp.up",)),
}
"""Every registered transform as it is without arguments, unless it needs some."""


def call(network: Denoiser, scale: float = 4.0) -> Tensor:
    rng = Rng(5)
    extra = {name: torch.full((2,), scale) for name in network.backbone.scalars}
    extra |= {x.told.name: rng.randn((2, FRAMES, x.told.numbers), x.told.name) for x in network.backbone.signals}
    cond = Cond(rng.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool), extra)
    steps = max((layer.steps for layer in network.modules() if isinstance(layer, StepLinear)), default=1)
    said = Call(step=steps - 1, steps=steps, rng=rng)
    return network(rng.randn((2, 4, FRAMES, 8, 8), "x"), torch.tensor([0.3, 0.9]), cond, said).raw


@pytest.fixture
def model() -> VideoModel:
    return tiny_model()


def test_every_transform_has_a_case() -> None:
    assert {type(case) for case in CASES.values()} == set(TRANSFORMS)


@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(CASES[case], Experts)])
def test_it_is_the_identity_exactly_where_it_says_so(model: VideoModel, case: str) -> None:
    changed = model.transformed(CASES[case])
    assert torch.equal(call(changed.denoiser), call(model.denoiser)) == CASES[case].identity
    assert changed.denoiser is not model.denoiser and not model.transforms


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_loads_again_bit_for_bit(model: VideoModel, case: str, tmp_path: Path) -> None:
    changed = model.transformed(CASES[case])
    shaken(changed.denoiser)
    loaded = VideoModel.from_pretrained(changed.save(tmp_path))
    assert loaded.card.transforms == loaded.transforms == (CASES[case],) == read_card(tmp_path).transforms
    assert torch.equal(call(loaded.denoiser), call(changed.denoiser))
    assert loaded.card.fingerprints["denoiser"] == fingerprint(loaded.denoiser) == fingerprint(changed.denoiser)
    again = loaded.save(tmp_path / "again")
    assert (again / "denoiser.safetensors").read_bytes() == (tmp_path / "denoiser.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_the_structure_is_made_without_weights(model: VideoModel, case: str, tmp_path: Path) -> None:
    """On the meta device, with the names, shapes and types that the weights have."""
    changed = model.transformed(CASES[case])
    empty = sketch("denoiser", read_card(changed.save(tmp_path)))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = [{k: (v.shape, v.dtype) for k, v in x.state_dict().items()} for x in (empty, changed.denoiser)]
    assert shapes[0] == shapes[1]
    left = VideoModel.from_pretrained(tmp_path, leave=("denoiser",))
    assert left.fingerprint("denoiser") == changed.fingerprint("denoiser")


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_and_a_card_have_its_every_field(case: str) -> None:
    tree = dump(CASES[case], Transform)
    assert tree["type"] == type(CASES[case]).__name__
    assert build(Transform, json.loads(json.dumps(tree)), names()) == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_a_source_applies_it(model: VideoModel, case: str, tmp_path: Path) -> None:
    """As a recipe says, after what the card of its folder says; the card is known before a weight is read."""
    first = ScalarInput(name="before", default=0.0)
    model.transformed(first).save(tmp_path)
    source = Pretrained(source=str(tmp_path), transforms=(CASES[case],))
    loaded = source.load(leave=("denoiser",))
    assert source.card().transforms == loaded.transforms == (first, CASES[case])
    assert "denoiser" not in source.card().fingerprints and "codec" in source.card().fingerprints
    both = model.transformed(first, CASES[case])
    assert torch.equal(call(loaded.denoiser), call(both.denoiser))
    assert fingerprint(loaded.denoiser) == fingerprint(both.denoiser)
    taken = Scratch(denoiser=str(tmp_path), codec=str(tmp_path), transforms=(CASES[case],))
    assert taken.card().transforms == taken.load().transforms == (first, CASES[case])


def test_fresh_networks_are_transformed() -> None:
    spec = Spec("VideoDiT", {"width": 24, "depth": 2, "heads": 2, "text_width": 16})
    plain, changed = (Scratch(denoiser=spec, transforms=x) for x in ((), (Int8(),)))
    assert changed.card().fingerprints == {"denoiser": "made new"}
    weights = plain.load().denoiser.state_dict(), changed.load().denoiser.state_dict()
    qkv = "backbone.blocks.0.attention.qkv"
    assert torch.equal(weights[1][f"{qkv}.quantised"], quantise(weights[0][f"{qkv}.weight"])[0])
    with pytest.raises(RecipeError, match=r"model\.transforms.*no.*codec"):
        Scratch(codec=Spec("FrameAutoencoder", {"width": 8, "depth": 1}), transforms=(Int8(),)).card()


def test_the_order_counts(model: VideoModel) -> None:
    """Names of a pruned network are those of the blocks that are left; a quantised layer is not quantised again."""
    first = model.transformed(Pruned(blocks=(0,)), Int8(targets=("blocks.0.mlp.up",)))
    assert call(first.denoiser).shape and len(first.denoiser.backbone.blocks) == 1
    with pytest.raises(ValueError, match="blocks.1"):
        model.transformed(Pruned(blocks=(0,)), Int8(targets=("blocks.1.mlp.up",)))
    for after in (Int8(), Branches()):
        with pytest.raises(ValueError, match=r"attention.qkv is a .*put Int8 before"):
            model.transformed(after, Int8())
    assert model.transformed(Int8(), Branches(rank=2)).transforms == (Int8(), Branches(rank=2))


def test_transforms_are_part_of_a_fingerprint(model: VideoModel) -> None:
    """Two networks with the same tensors that read them differently are not the same."""
    tensors = [model.transformed(ScalarInput(name="g", scale=s)) for s in (1.0, 2.0)]
    assert tensors[0].denoiser.state_dict().keys() == tensors[1].denoiser.state_dict().keys()
    assert len({fingerprint(m.denoiser) for m in (model, *tensors)}) == 3


def test_a_card_imports_no_transform(model: VideoModel, tmp_path: Path) -> None:
    card = json.loads((model.save(tmp_path) / "card.json").read_text())
    card["transforms"] = [{"type": "outsider_of_lists:Mine"}]
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(RecipeError, match=r"transforms\[0\]\.type is 'outsider_of_lists:Mine'.*import"):
        read_card(tmp_path)


# --- eight bits --------------------------------------------------------------------------------------------------------


def test_every_weight_is_within_half_a_step() -> None:
    weight = Rng(0).randn((7, 33), "w") * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    q, s = quantise(weight)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and s.shape == (7, 1) and (q[3] == 0).all() and s[3] == 1
    assert ((s * q - weight).abs() <= s / 2 * (1 + 1e-6)).all()
    again = quantise(s * q)
    assert torch.equal(again[0], q) and torch.allclose(again[1], s)


def test_a_row_has_its_own_scale() -> None:
    """One for all would lose the small rows."""
    weight = Rng(0).randn((4, 16), "w") * torch.tensor([1.0, 1e-3, 1e-3, 1e3])[:, None]
    q, s = quantise(weight)
    assert ((s * q - weight).norm(dim=1) / weight.norm(dim=1) < 0.01).all()


def test_int8_linears_compute_with_the_weights_they_have() -> None:
    layer = nn.Linear(9, 5).double()
    small = Int8Linear(layer)
    x = Rng(0).randn((2, 3, 9), "x").double()
    assert torch.equal(small(x), nn.functional.linear(x, small.scale * small.quantised, layer.bias))
    assert [name for name, _ in small.named_parameters()] == ["bias"]
    assert set(small.state_dict()) == {"quantised", "scale", "bias"}


def test_int8_is_a_quarter_on_disk(model: VideoModel, tmp_path: Path) -> None:
    """A quarter of the size of the layers that it changes; the tiny model has few others."""
    files = [
        m.save(tmp_path / name) / "denoiser.safetensors" for m, name in ((model, "a"), (model.transformed(Int8()), "b"))
    ]
    linear = 4 * sum(found.layer.weight.numel() for found in linears(model.denoiser.backbone.blocks))
    saved = files[0].stat().st_size - files[1].stat().st_size
    assert 0.6 * linear < saved < 0.75 * linear


def test_only_what_is_asked_for_is_quantised(model: VideoModel) -> None:
    changed = model.transformed(CASES["Int8-some"]).denoiser
    small = [name for name, module in changed.backbone.named_modules() if isinstance(module, Int8Linear)]
    assert small == ["blocks.0.attention.qkv", "blocks.1.attention.qkv", "blocks.1.mlp.up"]
    rest = model.transformed(Int8(keep=("attention.qkv", "up"))).denoiser.backbone.blocks[0]
    kept = {name for name, module in rest.named_modules() if type(module) is nn.Linear}
    assert kept == {"attention.qkv", "mlp.up"}
    with pytest.raises(ValueError, match=r"'to_q'.*attention\.qkv"):
        model.transformed(Int8(targets=("to_q",)))


@pytest.mark.slow
def test_eight_bits_are_enough_for_the_world(tmp_path: Path) -> None:
    """Figures of docs/transforms.md at a quarter of their size."""
    model = VideoModel.from_pretrained("world")
    small, prompts = model.transformed(Int8()), world_prompts(16, 0.5, 2024)
    plain, made = (m.latents(prompts, num_inference_steps=8) for m in (model, small))
    error = (made - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert 0 < error.mean() < 0.06
    files = [
        (m.save(tmp_path / name) / "denoiser.safetensors").stat().st_size for m, name in ((model, "a"), (small, "b"))
    ]
    assert files[1] < 0.33 * files[0]
    scenes = read_scenes(prompts, 32, 32)
    assert scenes is not None
    scores = [Checker().score(m.codec.decode(x).clamp(-1, 1), scenes) for m, x in ((model, plain), (small, made))]
    assert (scores[0].all_right == scores[1].all_right).double().mean() > 0.9


# --- which layers, and branches beside them ----------------------------------------------------------------------------


def test_a_target_is_whole_parts_of_a_name(model: VideoModel) -> None:
    names = {found.name.partition("blocks.")[2] for found in chosen(model.denoiser.backbone, ("kv",))}
    assert names == {"0.cross.kv", "1.cross.kv"}  # and not `attention.qkv`


def test_without_targets_only_blocks_are_changed(model: VideoModel) -> None:
    backbone = model.denoiser.backbone
    names = {found.name for found in chosen(backbone, ())}
    assert names == {f"blocks.{found.name}" for found in linears(backbone.blocks)}
    assert names < {found.name for found in linears(backbone)}


def test_a_branch_stands_beside_its_layer() -> None:
    layer, x = nn.Linear(6, 5).double(), Rng(0).randn((3, 6), "x").double()
    branched, other = Branched(layer, 2), Branched(layer, 2)
    branched.begin(Rng(0), "one")
    other.begin(Rng(0), "other")
    assert torch.equal(branched(x), layer(x)) and not torch.equal(branched.down.weight, other.down.weight)
    shaken(branched.up)
    torch.testing.assert_close(branched(x), layer(x) + x @ branched.down.weight.mT @ branched.up.weight.mT)
    torch.testing.assert_close(branched(x), nn.functional.linear(x, branched.weight, layer.bias))


# --- further scalars ---------------------------------------------------------------------------------------------------


def test_a_scalar_that_is_missing_is_named(model: VideoModel) -> None:
    network = model.transformed(ScalarInput(name="guidance")).denoiser
    cond = model.blank_cond(2)
    x, t = torch.zeros(2, 4, FRAMES, 8, 8), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=r"scalar 'guidance'.*Cond\.extra\['guidance'\].*default"):
        network(x, t, cond)
    with pytest.raises(ValueError, match=r"must be \[2\], got \(1,\)"):
        network(x, t, cond.with_extra({"guidance": torch.ones(1)}))
    network = model.transformed(ScalarInput(name="guidance", default=3.0)).denoiser
    shaken(network)
    said = cond.with_extra({"guidance": torch.full((2,), 3.0)})
    assert torch.equal(network(x, t, cond).raw, network(x, t, said).raw)
    other = cond.with_extra({"guidance": torch.full((2,), 5.0)})
    assert not torch.equal(network(x, t, cond).raw, network(x, t, other).raw)


def test_every_sample_has_its_own_scalar_and_a_gradient_reaches_it(model: VideoModel) -> None:
    network = model.transformed(ScalarInput(name="until")).denoiser
    cond, x = model.blank_cond(2), Rng(0).randn((1, 4, FRAMES, 8, 8), "x").expand(2, -1, -1, -1, -1)
    for t in (torch.full((2,), 0.5), torch.full((2, FRAMES), 0.5)):
        value = torch.tensor([0.1, 0.7], requires_grad=True)
        network(x, t, cond.with_extra({"until": value})).raw.square().sum().backward()
        own = network.backbone.scalars["until"].out
        assert own.weight.grad is not None and own.weight.grad.abs().sum() > 0
        assert value.grad is not None and (value.grad == 0).all()  # the new layer is zero still
        network.zero_grad()
    shaken(network)
    one = network(x, torch.full((2,), 0.5), cond.with_extra({"until": value})).raw
    assert not torch.equal(one[0], one[1]) and torch.autograd.grad(one.sum(), value)[0].abs().min() > 0


def test_a_scalar_is_divided_by_its_scale() -> None:
    small, large = (Scalar(ScalarInput(name="g", scale=scale), 4) for scale in (1.0, 10.0))
    shaken(small)
    large.load_state_dict(small.state_dict())
    time, value = torch.zeros(2, 1, 4), torch.tensor([0.5, 0.9])
    torch.testing.assert_close(large(time, {"g": 10 * value}), small(time, {"g": value}))
    assert not torch.allclose(large(time, {"g": value}), small(time, {"g": value}))


def test_scalars_are_refused_where_they_would_do_nothing(model: VideoModel) -> None:
    network = model.denoiser.backbone
    with pytest.raises(ValueError, match="reads a scalar 'g' already"):
        model.transformed(ScalarInput(name="g"), ScalarInput(name="g"))
    network.takes_scalars = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="VideoDiT takes no scalar inputs"):
        transformed(network, [ScalarInput(name="g")])
    for wrong in ({"name": "two words"}, {"name": "g", "scale": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            ScalarInput(**wrong)
    for word in ("keys", "values", "type", "training"):
        with pytest.raises(ValueError, match=f"'{word}' is a word of torch's own.*choose another one, or FrameInput"):
            ScalarInput(name=word)


# --- another pattern ---------------------------------------------------------------------------------------------------


def test_another_pattern_is_that_of_a_network_that_was_made_with_it(model: VideoModel) -> None:
    pattern, args = BlockCausal(chunk=2), model.denoiser.backbone.args
    made = Denoiser(VideoDiT(**{**args, "pattern": pattern}), model.card.path, model.card.kind)  # type: ignore[arg-type]
    made.load_state_dict(model.denoiser.state_dict())
    changed = model.transformed(Repatterned(pattern=pattern)).denoiser
    assert torch.equal(call(changed), call(made)) and not torch.equal(call(changed), call(model.denoiser))
    assert changed.backbone.pattern == pattern and changed.backbone.args == args
    del model.denoiser.backbone.blocks[:]
    with pytest.raises(ValueError, match="attention of a VideoDiT takes no pattern"):
        transformed(model.denoiser.backbone, [Repatterned(pattern=pattern)])


# --- pruned blocks -----------------------------------------------------------------------------------------------------


def test_the_blocks_that_are_left_are_run(model: VideoModel) -> None:
    blocks = model.denoiser.backbone.blocks
    changed = model.transformed(Pruned(blocks=(0,))).denoiser.backbone
    assert [fingerprints(b) for b in changed.blocks] == [fingerprints(blocks[1])]
    assert changed.args["depth"] == 2  # the card says what the blocks are left out of
    for wrong, words in (((2,), "from 0 to 1"), ((0, 0), "different"), ((0, 1), "all 2 blocks")):
        with pytest.raises(ValueError, match=words):
            model.transformed(Pruned(blocks=wrong))


def test_blocks_that_change_least_are_chosen(model: VideoModel) -> None:
    found = {"blocks.0": torch.tensor(0.5), "blocks.1": torch.tensor(0.1)}
    assert Pruned(blocks=(0,)).fit(model.denoiser.backbone, found) == Pruned(blocks=(1,))
    assert Int8().fit(model.denoiser.backbone, found) == Int8()


def fingerprints(block: nn.Module) -> float:
    return float(sum(p.detach().double().sum() for p in block.parameters()))
