"""Recipes: load, override, save, hash, diff, check, run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep import Recipe, RecipeError, distill
from fewstep.catalogue import classes
from fewstep.core.build import load_yaml
from fewstep.core.shipped import shipped
from fewstep.data import DataError
from fewstep.diffusion import CFG, DDIM, Contract, Shifted, Uniform
from fewstep.engine import Optim, Settings, WorldProbe
from fewstep.methods import (
    AVDM2,
    DMD2,
    AdversarialDistillation,
    Adversary,
    Alternating,
    FDivergence,
    FlowMatching,
    Matching,
    Method,
    Progressive,
    ProgressiveAdversarial,
    Reconstruction,
    ReverseKL,
    Reweighting,
)
from fewstep.models import Spec
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.source import Pretrained, Scratch, outline
from fewstep.pipeline import read
from fewstep.world.data import WorldClips

TINY = """
model:
  type: Scratch
  denoiser: {type: VideoDiT, width: 24, depth: 1, heads: 2, text_width: 16}
  text: {type: TextEncoder, width: 16, depth: 1, heads: 2, buckets: 64}
  codec: {type: FrameAutoencoder, width: 8, depth: 1}
  num_frames: 4
method: {type: DMD2, critic_updates: 2}
data: {type: WorldClips, num_frames: 4}
settings:
  steps: 2
  batch: 2
  optim: {student: {lr: 1e-4}, critic: {lr: 1e-4}}
"""

NOW = "{sampler: {type: Heun}, steps: 32, grid: {type: Shifted, shift: 3.0}, guidance: {scale: 2.0}}"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("path", shipped().values(), ids=shipped())
def test_every_recipe_of_the_tree_loads_and_is_inverse_to_its_text(path: Path, tmp_path: Path) -> None:
    recipe = read(path, [])
    saved = recipe.save(tmp_path)
    assert read(saved, []) == recipe == read(tmp_path, [])
    assert read(saved, []).hash == recipe.hash
    assert recipe.diff(read(saved, [])) == []


@pytest.mark.parametrize("path", shipped().values(), ids=shipped())
def test_every_recipe_of_the_tree_says_what_it_costs_and_what_it_gives(path: Path) -> None:
    header = path.read_text().partition("\nmodel:")[0]
    assert "Cost" in header and "score" in header.lower(), "a header says cost and score, or that they are untested"


def test_names_are_unique() -> None:
    names = [cls.__name__ for cls in classes()]
    assert len(names) == len(set(names))


def test_python_and_yaml_make_the_same_recipe(tiny: Path) -> None:
    model = Scratch(
        denoiser=Spec.from_tree({"type": "VideoDiT", "width": 24, "depth": 1, "heads": 2, "text_width": 16}, {}, _at()),
        text=Spec.from_tree({"type": "TextEncoder", "width": 16, "depth": 1, "heads": 2, "buckets": 64}, {}, _at()),
        codec=Spec.from_tree({"type": "FrameAutoencoder", "width": 8, "depth": 1}, {}, _at()),
        num_frames=4,
    )
    settings = Settings(steps=2, batch=2, optim={"student": Optim(lr=1e-4), "critic": Optim(lr=1e-4)})
    made = Recipe(model=model, method=DMD2(critic_updates=2), data=WorldClips(num_frames=4), settings=settings)
    assert made == Recipe.load(tiny) and made.hash == Recipe.load(tiny).hash


def test_overrides_are_read_by_type(tiny: Path) -> None:
    recipe = Recipe.load(
        tiny,
        [
            ("method.critic-updates", "3"),
            ("method.guidance.scale", "4"),
            ("settings.optim.critic.lr", "2e-5"),
            ("settings.compile", "true"),
            ("model.denoiser.width", "32"),
            ("model.text", "runs/text"),
            ("probe.every", "5"),
        ],
    )
    assert (
        isinstance(recipe.method, DMD2)
        and isinstance(recipe.model, Scratch)
        and isinstance(recipe.model.denoiser, Spec)
    )
    assert recipe.method.critic_updates == 3 and recipe.method.guidance.scale == 4.0
    assert recipe.settings.optim["critic"].lr == 2e-5 and recipe.settings.compile
    assert recipe.model.denoiser.args["width"] == 32 and recipe.model.text == "runs/text"
    assert recipe.probe == WorldProbe(every=5)
    keys = {d.key for d in Recipe.load(tiny).diff(recipe)}
    assert {"method.critic_updates", "settings.optim.critic.lr", "model.denoiser.width"} <= keys


def test_another_type_starts_from_its_own_defaults(tiny: Path) -> None:
    pairs = [("settings.optim", "{student: {lr: 1e-3}}"), ("method.cond-drop", "0.2"), ("method.type", "FlowMatching")]
    recipe = Recipe.load(tiny, pairs)
    assert recipe.method == FlowMatching(cond_drop=0.2)
    muon = Recipe.load(tiny, [("settings.optim.student.type", "muon")])
    assert muon.settings.optim["student"] == Optim(type="muon", lr=1e-4)


@pytest.mark.parametrize("contract", ["{solver: heun, steps: 32, shift: 3.0, guidance: {scale: 2.0}}", NOW])
def test_a_contract_may_be_typed_as_in_the_first_version(tiny: Path, contract: str) -> None:
    tiny.write_text(TINY.replace("  num_frames: 4\n", f"  num_frames: 4\n  contract: {contract}\n", 1))
    recipe = Recipe.load(tiny, [("model.contract.grid.shift", "5.0"), ("model.contract.sampler.type", "DDIM")])
    expected = Contract(sampler=DDIM(), steps=32, grid=Shifted(shift=5.0), guidance=CFG(scale=2.0))
    assert isinstance(recipe.model, Scratch) and recipe.model.contract == recipe.model.card().contract == expected
    assert "solver" not in recipe.text
    with pytest.raises(RecipeError, match=r"contract\.shift is a key of the first version .* change grid instead"):
        Recipe.load(tiny, [("model.contract.shift", "5.0")])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method.critic-updats", "3", "command line: method.critic_updats is unknown; did you mean critic_updates?"),
        ("methd.critic-updates", "3", "command line: methd is unknown; did you mean method?"),
        ("method.critic-updates", "many", "method.critic_updates must be a whole number, got 'many'"),
        ("method.critic-updates", "0", "method.critic_updates must be at least 1, got 0"),
        ("method.type", "DMD", "method.type cannot be 'DMD'; did you mean DMD2?"),
        ("settings.autocast", "bf61", "settings.autocast cannot be 'bf61'; did you mean bf16? (accepted: off, bf16)"),
        ("settings.steps.now", "3", "settings.steps.now does not exist: settings.steps is 2"),
        ("model.denoiser.widht", "3", "model.denoiser.widht is unknown; did you mean width?"),
    ],
)
def test_bad_overrides(tiny: Path, key: str, value: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tiny, [(key, value)])
    assert words in str(caught.value)


def test_a_missing_file_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tinny.yaml. Did you mean .*tiny.yaml"):
        Recipe.load(tiny.with_name("tinny.yaml"))


def test_hash_depends_on_values_only(tiny: Path) -> None:
    recipe = Recipe.load(tiny)
    tiny.write_text(
        TINY.replace("method: {type: DMD2, critic_updates: 2}", "method: {critic_updates: 2, type: DMD2, anchor: 0}")
    )
    assert Recipe.load(tiny).hash == recipe.hash
    assert recipe.override([("settings.seed", "1")]).hash != recipe.hash
    spread = recipe.override([("settings.parallel.checkpointing", "true")])
    assert spread != recipe and spread.hash == recipe.hash  # how a run is spread decides none of its numbers


def test_check_refuses_before_any_weight(tiny: Path) -> None:
    recipe = Recipe.load(tiny)
    assert recipe.check().num_frames == 4
    with pytest.raises(DataError, match="DMD2 needs x0"):
        recipe.override(
            [("method.adversary", "{weight: 0.01}"), ("data", "{type: Prompts, path: nowhere.txt}")]
        ).check()
    with pytest.raises(ValueError, match=r"settings.optim.critc: no such role is trained; did you mean critic\?"):
        recipe.override([("settings.optim.critc.lr", "1e-3")]).check()
    with pytest.raises(RecipeError, match="trains the codec, but the model has only denoiser, text"):
        recipe.override([("method.type", "Reconstruction"), ("model.codec", "null"), ("settings.optim", "{}")]).check()
    with pytest.raises(RecipeError, match="model.denoiser.text_width is 128, but model.text.width is 16"):
        recipe.override([("model.denoiser.text-width", "128")]).check()
    with pytest.raises(DataError, match=r"data.num_frames is 16, but model 'scratch' makes 4.*data.num_frames: 4"):
        recipe.override([("data.num-frames", "16")]).check()
    with pytest.raises(DataError, match="clips are 32 x 32, but model 'scratch' makes 64 x 64"):
        recipe.override([("model.height", "64"), ("model.width", "64")]).check()
    with pytest.raises(DataError, match="no such file"):
        recipe.override([("data", "{type: Prompts, path: nowhere.txt}")]).check()
    with pytest.raises(ValueError, match="does not train the student within settings.steps: 2"):
        recipe.override([("method.warmup", "2")]).check()
    with pytest.raises(ValueError, match="begins after 1200 iterations"):
        recipe.override([("method.type", "Progressive"), ("settings.optim", "{}")]).check()
    with pytest.raises(ValueError, match="this run trains the codec; leave probe out"):
        recipe.override(
            [("method.type", "Reconstruction"), ("settings.optim", "{}"), ("probe", "{prompts: 2}")]
        ).check()
    with pytest.raises(FileNotFoundError, match="no card.json"):
        recipe.override([("model", "{type: Pretrained, source: nowhere}")]).check()


COMPARING = (
    DMD2(adversary=Adversary(mismatched=True)),
    DMD2(adversary=Adversary(), matching=FDivergence()),
    DMD2(reweighting=Reweighting()),
    AVDM2(adversary=Adversary(mismatched=True, density=Uniform())),
    AdversarialDistillation(adversary=Adversary(mismatched=True, density=Uniform(), draws=2)),
    ProgressiveAdversarial(
        progressive=Progressive(stages=((4, 1), (2, 1))), adversary=Adversary(mismatched=True, trained=True)
    ),
    Alternating(distillation=DMD2(reweighting=Reweighting())),
)
"""Methods whose losses compare clips of a batch."""


@pytest.mark.parametrize("method", COMPARING, ids=lambda method: type(method).__name__)
def test_a_batch_of_one_has_nothing_to_compare(tiny: Path, method: Method) -> None:
    pair = replace(Recipe.load(tiny), method=method, settings=Settings(steps=2, batch=2))
    pair.check()
    with pytest.raises(
        ValueError, match=rf"batch is 1, and {type(method).__name__} .*write at least settings\.batch: 2"
    ):
        replace(pair, settings=Settings(steps=2, batch=1)).check()


@pytest.mark.parametrize("matching", [FDivergence(kind="reverse_kl"), ReverseKL()])
def test_a_batch_of_one_is_enough_elsewhere(tiny: Path, matching: Matching) -> None:
    method = DMD2(matching=matching, adversary=Adversary(draws=2, density=Uniform()))
    replace(Recipe.load(tiny), method=method, settings=Settings(steps=2, batch=1)).check()


def test_blocks_that_a_network_does_not_have_are_refused_before_any_weight(tiny: Path) -> None:
    """Of the teacher, and of a copy of it."""
    for trained in (False, True):
        method = DMD2(adversary=Adversary(layers=(-1, 0), trained=trained))
        recipe = replace(Recipe.load(tiny), method=method)
        recipe.check()
        for layers in ((0, 1), (-2,)):
            wrong = replace(method, adversary=Adversary(layers=layers, trained=trained))
            of = "eyes" if trained else "teacher"
            with pytest.raises(
                ValueError, match=rf"discriminator of DMD2 reads .* the {of}: layers must be from -1 to 0"
            ):
                replace(recipe, method=wrong).check()


def test_scratch_is_reproducible_and_its_outline_has_no_memory(tiny: Path) -> None:
    source = Recipe.load(tiny).model
    one, two, shape = source.load(), source.load(), outline(source.card())
    for a, b, s in zip(one.denoiser.parameters(), two.denoiser.parameters(), shape.denoiser.parameters(), strict=True):
        assert a.equal(b) and a.shape == s.shape and s.is_meta
    assert Spec.of(one.denoiser.backbone) == source.card().parts["denoiser"]


def test_parts_come_from_an_earlier_folder(tiny: Path, tmp_path: Path) -> None:
    first = Recipe.load(tiny).model.load()
    first.save(tmp_path / "first")
    second = Scratch(
        denoiser=Spec("VideoDiT", {"text_width": 16}), text=str(tmp_path / "first"), codec=str(tmp_path / "first")
    )
    assert second.card().parts["text"] == Spec.of(first.text)
    assert second.load().codec.state_dict().keys() == first.codec.state_dict().keys()
    with pytest.raises(RecipeError, match="has no features; it has"):
        Scratch(features=str(tmp_path / "first")).card()


def test_run_writes_its_result_with_its_recipe_and_claims_the_folder(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny).override([("method.type", "Reconstruction"), ("settings.optim", "{}")])
    assert isinstance(recipe.method, Reconstruction)
    student = recipe.run(tmp_path / "run", quiet=True)
    assert student.card.provenance["recipe"] == recipe.hash
    assert Recipe.load(tmp_path / "run") == recipe == Recipe.load(tmp_path / "run" / "codec")
    assert VideoModel.from_pretrained(tmp_path / "run" / "codec").card == student.card
    with pytest.raises(RecipeError, match=r"another recipe \(settings.seed: 0 -> 1\)"):
        recipe.override([("settings.seed", "1")]).run(tmp_path / "run", quiet=True)


def test_distill_from_python(tiny: Path, tmp_path: Path) -> None:
    Recipe.load(tiny).model.load().save(tmp_path / "teacher")
    student = distill(
        model=tmp_path / "teacher",
        method=DMD2(critic_updates=1),
        settings=Settings(steps=1, batch=2),
        output=tmp_path / "run",
        quiet=True,
    )
    assert Recipe.load(tmp_path / "run").data == WorldClips(num_frames=4)  # of the teacher's size
    assert student.card.role == "student" and student.card.contract.trained
    saved = load_yaml((tmp_path / "run" / "recipe.yaml").read_text())
    source = str(tmp_path / "teacher")
    assert saved["model"] == {"type": "Pretrained", "source": source, "lora": None, "transforms": []}
    assert Recipe.load(tmp_path / "run").model == Pretrained(source=str(tmp_path / "teacher"))


def test_a_student_remembers_where_everything_comes_from(tiny: Path, tmp_path: Path) -> None:
    codec = Recipe.load(tiny).model.load()
    made = {"licence": "CC0-1.0", "recipe": "abc"}
    VideoModel(replace(codec.card, provenance=made), codec.parts).save(tmp_path / "first")
    teacher = Recipe.load(tiny, [("model.codec", str(tmp_path / "first")), ("method.type", "FlowMatching")])
    teacher = teacher.override([("settings.optim", "{}"), ("settings.steps", "1")])
    card = teacher.run(tmp_path / "teacher", quiet=True).card
    assert card.provenance["codec.recipe"] == "abc" and card.provenance["recipe"] == teacher.hash
    assert "teacher.recipe" not in card.provenance and "licence" not in card.provenance  # it was made from scratch
    folder = tmp_path / "teacher" / "teacher"
    known = read_card(folder)
    told = json.loads((folder / "card.json").read_text())
    told["provenance"]["licence"] = "Apache-2.0"
    (folder / "card.json").write_text(json.dumps(told))
    source = tmp_path / "teacher" / "teacher"
    student = distill(
        model=source,
        method=DMD2(critic_updates=1),
        settings=Settings(steps=1, batch=2),
        output=tmp_path / "s",
        quiet=True,
    )
    said = student.card.provenance
    assert (
        said["teacher.recipe"] == teacher.hash == known.provenance["recipe"] and said["teacher.codec.recipe"] == "abc"
    )
    assert said["licence"] == said["teacher.licence"] == "Apache-2.0" and said["teacher.codec.licence"] == "CC0-1.0"
    assert json.loads(said["data settings"]) == {
        "type": "WorldClips",
        "num_frames": 4,
        "pool": 0,
        "pool_seed": 0,
        "style": "plain",
        "part": None,
        "low": {"factor": 4, "blur": 0.0, "noise": 0.0},
    }
    assert "cores" in said["machine"] and "torch" in said["versions"]
    state = json.loads(next((tmp_path / "s" / "checkpoints").glob("*/state.json")).read_text())
    assert not {"machine", "versions"} & state["values"]["identity"].keys()  # a run may go on elsewhere


def _at():  # type: ignore[no-untyped-def]
    from fewstep.core.build import At

    return At()
