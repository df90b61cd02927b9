"""Style LoRAs: read from every tool's files, merged into teachers, and measured on students."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.cli import main
from fewstep.core import Batch, Rng
from fewstep.data.base import Source
from fewstep.diffusion import Contract, Exact
from fewstep.engine import Optim, Settings, train
from fewstep.engine.nets import origin
from fewstep.engine.prepare import prepare, require_possible
from fewstep.evaluate.style import Styled, Survival, check_style
from fewstep.methods import DMD2, BackwardSimulation, FlowMatching
from fewstep.models import Lora, VideoModel
from fewstep.models.bundle import read_card
from fewstep.models.card import allocate
from fewstep.models.fingerprint import fingerprint
from fewstep.models.lora import adapt, adapters, merge, save_adapter
from fewstep.models.source import Pretrained
from fewstep.models.spec import Spec
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips, encode
from fewstep.world.grammar import world_prompts
from support_engine import FRAMES, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball", "a blue box", "a cat")
METHOD = DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),)))


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny_model()


@pytest.fixture(scope="module")
def lora(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that change the clips."""
    network = adapt(teacher.denoiser, Lora(rank=2, alpha=1.0), Rng(0))
    with torch.no_grad():
        for adapter in adapters(network).values():
            adapter.lora_B.weight.copy_(Rng(1).randn(tuple(adapter.lora_B.weight.shape), "b"))
    return save_adapter(network, tmp_path_factory.mktemp("style"), "tiny")


def with_denoiser(model: VideoModel, change: Any, **card: Any) -> VideoModel:
    """A student with a changed copy of the denoiser."""
    network = tiny_model().denoiser
    with torch.no_grad():
        change(network)
    return model.with_part("denoiser", network, role="student", **card)


def check_lora(teacher: VideoModel, student: VideoModel, lora: Path, prompts: Sequence[str], output: Path) -> Survival:
    return check_style(Styled.by_lora(teacher, lora), Styled.by_lora(student, lora), prompts, output)


def stretch(network: Any) -> None:
    for parameter in network.parameters():
        parameter.mul_(1.01)


# --- the score ------------------------------------------------------------------------------------------------------------


def test_a_student_that_is_the_teacher_keeps_all_of_it(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    found = check_lora(teacher, teacher, lora, PROMPTS, tmp_path)
    assert (found.score, found.cosine, found.size) == pytest.approx((1.0, 1.0, 1.0))
    assert (found.n, found.error) == (6, pytest.approx(0.0, abs=1e-9)) and found.features
    assert json.loads((tmp_path / "lora.json").read_text())["score"] == found.score
    assert (tmp_path / "lora.gif").read_bytes()[:3] == b"GIF"


def test_a_student_that_ignores_it_keeps_nothing(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    def deaf(network: Any) -> None:
        network.backbone.out.weight.zero_()

    found = check_lora(teacher, with_denoiser(teacher, deaf), lora, PROMPTS, tmp_path)
    assert (found.score, found.cosine, found.size, found.error) == (0.0, 0.0, 0.0, 0.0)


def test_another_network_keeps_some_of_it(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    """And the score is the product of direction and size."""

    def other(network: Any) -> None:
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.05 * Rng(7).randn(tuple(parameter.shape), str(number)))

    student = with_denoiser(teacher, other, contract=Contract(steps=1, grid=Exact()))
    found = check_lora(teacher, student, lora, PROMPTS, tmp_path)
    assert found.score == pytest.approx(found.cosine * found.size) and found.error > 0 and abs(found.score - 1) > 1e-3


def test_a_student_may_have_the_style_in_its_weights(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    """One that learnt all of it is told from one that learnt nothing."""
    pair, restyled = Styled.by_lora(teacher, lora), teacher.with_lora(lora)
    assert check_style(pair, Styled(teacher, restyled, "restyled"), PROMPTS, tmp_path).score == pytest.approx(1.0)
    assert check_style(pair, Styled(teacher, teacher, "restyled"), PROMPTS, tmp_path).score == 0.0


def test_what_says_nothing_is_refused(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    nothing = save_adapter(adapt(teacher.denoiser, Lora(rank=2), Rng(0)), tmp_path / "nothing", "tiny")
    with pytest.raises(ValueError, match="does not change the teacher's clips"):
        check_lora(teacher, teacher, nothing, PROMPTS, tmp_path)
    longer = VideoModel(replace(teacher.card, num_frames=8), teacher.parts)
    with pytest.raises(ValueError, match="different"):
        check_lora(teacher, longer, lora, PROMPTS, tmp_path)


def test_by_command(teacher: VideoModel, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(teacher.save(tmp_path / "teacher"))
    options = ["--teacher", folder, "--student", folder, "--prompt", "a red ball", "--output", str(tmp_path / "out")]
    assert main(["check-lora", str(lora), *options, "--quiet"]) == 0
    assert "score 1.000" in capsys.readouterr().out and (tmp_path / "out" / "lora.gif").is_file()
    assert main(["check-lora", str(lora), *options, "--restyled", folder, "--quiet"]) == 0
    assert "score 0.000" in capsys.readouterr().out
    assert main(["check-lora", str(lora), *options, "--num-inference-steps", "1", "--quiet"]) == 0
    assert "score 1.000" not in capsys.readouterr().out
    assert main(["check-lora", str(lora), *options, "--features", "pooled", "--quiet"]) == 0
    assert "features pooled (72 fixed means" in capsys.readouterr().out
    assert main(["check-lora", str(lora), *options, "--features", str(tmp_path / "i3d.pt")]) == 2
    assert "i3d.pt: no such file" in capsys.readouterr().err


def test_a_teacher_of_diffusers_takes_the_student_s_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own size is what its authors recommend, and students are often made in another."""
    pytest.importorskip("diffusers")
    from fewstep.models.source import Diffusers
    from tiny_models import save_tiny

    folder = save_tiny("wan", tmp_path / "wan")
    model = Diffusers(source=str(folder), num_frames=5, height=32, width=32).load()
    network = adapt(model.denoiser, Lora(rank=2, alpha=1.0), Rng(0))
    with torch.no_grad():
        for adapter in adapters(network).values():
            adapter.lora_B.weight.copy_(Rng(1).randn(tuple(adapter.lora_B.weight.shape), "b"))
    lora = save_adapter(network, tmp_path / "lora", "tiny")
    contract = Contract(steps=1, grid=Exact())
    student = model.with_part("denoiser", model.denoiser, role="student", contract=contract).save(tmp_path / "student")
    words = ["--teacher", str(folder), "--student", str(student), "--prompt", "a red ball", "--seeds", "1", "--quiet"]
    assert read_card(folder).num_frames != 5
    assert main(["check-lora", str(lora), *words, "--output", str(tmp_path / "out")]) == 0
    assert "wan at the student's size: 5 frames of 32 x 32" in capsys.readouterr().out
    assert (tmp_path / "out" / "lora.json").is_file()


# --- files ----------------------------------------------------------------------------------------------------------------


def test_a_folder_of_peft_s_is_its_merged_network(teacher: VideoModel, lora: Path) -> None:
    network = adapt(teacher.denoiser, Lora(rank=2, alpha=1.0), Rng(0))
    stored = load_file(lora / "adapter_model.safetensors")
    network.load_state_dict({name.removeprefix("base_model.model."): value for name, value in stored.items()})
    ours, theirs = teacher.with_lora(lora).denoiser.state_dict(), merge(teacher.denoiser, network).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])
    assert teacher.with_lora(lora).card.provenance["lora"] == str(lora)


def test_tensors_without_a_layer_are_named(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    stored = load_file(lora / "adapter_model.safetensors")
    save_file(stored | {"text_encoder.layer.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ tensors belong to no layer .*text_encoder\.layer"):
        teacher.with_lora(tmp_path / "style.safetensors")
    with pytest.raises(FileNotFoundError, match="give a LoRA"):
        teacher.with_lora(tmp_path / "nowhere")


def test_every_tool_s_names_are_the_same_style(tmp_path: Path) -> None:
    """Diffusers' names with its metadata, ComfyUI's with alphas, the older words for A and B: one update."""
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    from fewstep.models.adapters.lora_reading import read_lora
    from tiny_models import save_tiny

    denoiser = VideoModel.from_pretrained(save_tiny("wan", tmp_path / "wan")).denoiser
    down, up = Rng(0).randn((2, 24), "a"), Rng(0).randn((24, 2), "b")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    ours, comfy = "transformer.blocks.1.attn1.to_out.0", "diffusion_model.blocks.1.self_attn.o"
    save_file({f"{ours}.lora_A.weight": down, f"{ours}.lora_B.weight": up}, tmp_path / "a.safetensors", metadata)
    alpha = {f"{comfy}.alpha": torch.tensor(6.0)}
    save_file(alpha | {f"{comfy}.lora_down.weight": down, f"{comfy}.lora_up.weight": up}, tmp_path / "b.safetensors")
    for file in ("a.safetensors", "b.safetensors"):
        updates = read_lora(denoiser, tmp_path / file).layers
        assert updates.keys() == {"backbone.blocks.1.attn1.to_out.0"}
        torch.testing.assert_close(updates["backbone.blocks.1.attn1.to_out.0"].update, 3.0 * up @ down)


# --- the teacher of a short re-distillation --------------------------------------------------------------------------------


def test_a_recipe_distils_the_restyled_teacher(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    folder = teacher.save(tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{type: Pretrained, source: {folder}, lora: {lora}}}\n"
        "method: {type: DMD2, critic_updates: 1, rollout: {type: BackwardSimulation, grids: [[1.0, 0.5]]}}\n"
        f"data: {{type: WorldClips, num_frames: {FRAMES}}}\n"
        "settings: {steps: 1, batch: 2, health: null}\n"
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    source = Pretrained(source=str(folder), lora=str(lora))
    assert recipe.model == source and "denoiser" not in source.card().fingerprints
    restyled = source.load(leave=("denoiser",))
    assert restyled.fingerprint("denoiser") == teacher.with_lora(lora).fingerprint("denoiser")
    student = recipe.run(tmp_path / "run", quiet=True)
    assert student.card.provenance["teacher.lora"] == str(lora)
    assert restyled.fingerprint("denoiser") in student.card.provenance["teacher"]
    with pytest.raises(FileNotFoundError, match=r"model\.lora: .* is not there"):
        replace(source, lora=str(tmp_path / "gone")).card()


def test_a_student_goes_on_with_the_restyled_teacher(teacher: VideoModel, lora: Path, tmp_path: Path) -> None:
    """Its first weights are its own, the critic's are the teacher's, and its card names both."""
    folder, first = (
        teacher.save(tmp_path / "teacher"),
        with_denoiser(teacher, stretch, provenance={"licence": "CC-BY-NC-4.0"}),
    )
    first.save(tmp_path / "first")
    settings = small(1, start=str(tmp_path / "first"), health=None)
    model = Pretrained(source=str(folder), lora=str(lora)).load()
    data = WorldClips(num_frames=FRAMES)
    nets = prepare(model, METHOD, data, settings, tmp_path / "run").nets
    assert fingerprint(nets.student) == first.fingerprint("denoiser")
    assert fingerprint(nets.critic) == fingerprint(nets.teacher) == model.fingerprint("denoiser")
    student = Recipe(
        model=Pretrained(source=str(folder), lora=str(lora)), method=METHOD, data=data, settings=settings
    ).run(tmp_path / "run", quiet=True)
    assert student.card.provenance["student"] == f"tiny {first.fingerprint('denoiser')}"
    assert student.card.provenance["student.licence"] == "CC-BY-NC-4.0"
    ours, before, restyled = (m.weights("denoiser")["backbone.out.weight"] for m in (student, first, model))
    assert 0 < (ours - before).abs().max() < (ours - restyled).abs().max()


@pytest.mark.parametrize(("frozen", "autocast"), [("float32", "off"), ("bf16", "bf16")])
def test_adapters_go_on_from_an_earlier_student(frozen: Any, autocast: Any, tmp_path: Path) -> None:
    """Its weights are those under the adapters of the student, the critic's are the teacher's; the result has the student's."""
    first, teacher = tiny_model(seed=3), tiny_model()
    first.save(tmp_path / "first")
    settings = small(1, start=str(tmp_path / "first"), lora=Lora(rank=2), health=None, frozen=frozen, autocast=autocast)
    run = prepare(teacher, METHOD, WorldClips(num_frames=FRAMES), settings, tmp_path / "run")
    begun = run.student().weights("denoiser")
    assert all(torch.equal(begun[name], x) for name, x in first.weights("denoiser").items())
    assert any(not torch.equal(begun[name], x) for name, x in tiny_model().weights("denoiser").items())
    run.iterate()
    trained, moved = run.student().weights("denoiser"), first.weights("denoiser")
    gaps = {name: float((trained[name] - x).detach().abs().max()) for name, x in moved.items()}
    assert 0 < max(gaps.values()) < 0.1
    run.keep(tmp_path / "student")
    assert str(tmp_path / "first") in (tmp_path / "student/adapter/adapter_config.json").read_text()


def test_a_start_that_does_not_fit_is_refused(teacher: VideoModel, tmp_path: Path) -> None:
    teacher.save(tmp_path / "teacher")
    card, wrong = read_card(tmp_path / "teacher"), "does not match this teacher: its "
    other = Spec("VideoDiT", {**card.parts["denoiser"].args, "depth": 1})
    others = {
        "denoiser": replace(card, parts={**card.parts, "denoiser": other}),
        "kind": replace(card, kind="x0"),
    }
    for what, changed in others.items():
        VideoModel(changed, {n: allocate(n, changed) for n in changed.parts}).save(tmp_path / what)
        with pytest.raises(ValueError, match=wrong + what):
            require_possible(METHOD, small(1, start=str(tmp_path / what)), card, None)
    with pytest.raises(ValueError, match="has no denoiser"):
        require_possible(METHOD, small(1, start="world/features"), card, None)
    with pytest.raises(FileNotFoundError, match="gone"):
        require_possible(METHOD, small(1, start=str(tmp_path / "gone")), card, None)


def test_every_role_begins_with_stored_weights() -> None:
    """In a sharded run, networks are made without weights, and every role takes stored ones."""
    roles = ("teacher", "student", "ema", "critic")
    assert [origin(METHOD, role, {"teacher"}) for role in roles] == ["teacher"] * 4
    assert [origin(METHOD, role, {"teacher", "student"}) for role in roles] == [
        "teacher",
        "student",
        "student",
        "teacher",
    ]


# --- on the built-in world ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Negatives(WorldClips):
    """The world's clips in negative colours: a style that no prompt asks for."""

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        return _Negatives(super().open(model, needs | {"frames"}), model)


@dataclass(frozen=True)
class _Negatives:
    source: Source
    model: VideoModel

    def batch(self, size: int, rng: Rng) -> Batch:
        batch = self.source.batch(size, rng)
        return replace(batch, x0=encode(self.model, -batch.require("frames")))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_trained_style_survives_in_fewer_steps(tmp_path: Path) -> None:
    """The teacher in 6 steps is a student that was never retrained: the style is still in it."""
    teacher = VideoModel.from_pretrained("world")
    settings: Settings = small(
        60, batch=8, lora=Lora(rank=8, alpha=16.0), optim={"student": Optim(lr=2e-3)}, health=None
    )
    train(teacher, FlowMatching(), Negatives(num_frames=16), settings, tmp_path, quiet=True)
    lora, prompts = tmp_path / "teacher" / "adapter", world_prompts(4, 0.0, 0)
    full, few = (replace(teacher.card, contract=replace(teacher.card.contract, steps=n)) for n in (16, 6))
    models = [VideoModel(card, teacher.parts) for card in (full, few)]
    found = check_lora(models[0], models[1], lora, prompts, tmp_path / "near")
    print(found)
    assert found.cosine > 0.8 and abs(found.score - 1) < 0.5 and found.error < 0.3
