"""A student with transforms of its own: it is distilled from an untouched teacher, and its card says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Pipeline, Stage, VideoModel, distill
from fewstep.compress import Branches, Int8, Pruned, ScalarInput, Transform
from fewstep.core import Cond, RecipeError, Rng
from fewstep.engine import Health, Settings
from fewstep.engine.checkpoint import Checkpoint
from fewstep.engine.memory import Holding
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import prepare, require_possible
from fewstep.methods import AVDM2, DMD2, Consistency, Method, Progressive, Sync, Update
from fewstep.methods.roles import Copy, Role
from fewstep.models import Denoiser, Lora, fingerprint
from fewstep.models.bundle import read_card
from fewstep.models.lora import merge
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import FRAMES, TWO_GRIDS, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
DATA = WorldClips(num_frames=FRAMES)
DMD = DMD2(critic_updates=1, rollout=TWO_GRIDS)
LORA = Lora(rank=2)
PRUNED = Pruned(blocks=(0,))
CASES: Mapping[str, tuple[tuple[Transform, ...], dict[str, Any]]] = {
    "pruned": ((PRUNED,), {}),
    "branches": ((Branches(rank=2),), {}),
    "scalar": ((ScalarInput(name="guidance", scale=10.0, default=4.0),), {}),
    "eight bits": ((Int8(),), {"lora": LORA}),
    "both": ((Pruned(blocks=(1,)), Int8(keep=("mlp.up",))), {"lora": LORA}),
}
"""Transforms of the student, and the settings with which it can be trained."""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return tiny_model().save(tmp_path / "teacher")


def raw(network: Denoiser) -> Tensor:
    rng = Rng(5)
    cond = Cond(rng.randn((2, 3, 16), "text"), torch.ones(2, 3, dtype=torch.bool))
    return network(rng.randn((2, 4, FRAMES, 8, 8), "x"), torch.tensor([0.3, 0.9]), cond).raw


def prepared(settings: Settings, folder: Path, method: Method = DMD) -> Any:
    return prepare(tiny_model(), method, DATA, settings, folder)


@pytest.mark.parametrize("case", CASES)
def test_only_the_student_is_transformed(teacher: Path, case: str, tmp_path: Path) -> None:
    """From the recipe to the folder: the card says what it is, and loading gives the network that was trained."""
    transforms, others = CASES[case]
    settings = small(2, transforms=transforms, **others)
    student = distill(method=DMD, settings=settings, output=tmp_path / "run", model=teacher, data=DATA, quiet=True)
    assert student.card.transforms[: len(transforms)] == transforms
    saved = read_card(tmp_path / "run" / "student")
    assert saved.transforms == student.card.transforms
    assert saved.provenance["teacher"] == f"tiny {tiny_model().fingerprint('denoiser')}"
    loaded = VideoModel.from_pretrained(tmp_path / "run" / "student")
    assert torch.equal(raw(loaded.denoiser), raw(student.denoiser))
    assert Recipe.load(tmp_path / "run" / "student").settings.transforms == transforms
    effective = json.loads((tmp_path / "run" / "effective.json").read_text())
    assert effective["transforms"] == {"student": [repr(transform) for transform in transforms]}


@pytest.mark.parametrize("case", CASES)
def test_it_starts_from_the_weights_of_the_teacher(case: str, tmp_path: Path) -> None:
    transforms, others = CASES[case]
    run = prepared(small(2, transforms=transforms, **others), tmp_path)
    assert torch.equal(raw(run.nets.student), raw(tiny_model().transformed(*transforms).denoiser))
    assert torch.equal(raw(merge(run.base, run.nets.student)), raw(run.nets.student))
    for role in ("teacher", "critic"):
        assert torch.equal(raw(run.nets[role]), raw(tiny_model().denoiser)) and not run.nets[role].backbone.transforms
    assert run.model.transforms == ()
    before = [fingerprint(run.model.denoiser), raw(run.nets.student)]
    run.iterate()
    assert fingerprint(run.model.denoiser) == before[0] and not torch.equal(raw(run.nets.student), before[1])


def test_checks_compare_with_the_student_before_it_was_trained(teacher: Path, tmp_path: Path) -> None:
    first = tiny_model(seed=3).save(tmp_path / "first")
    for start, begun in ((None, tiny_model()), (str(first), tiny_model(seed=3))):
        settings = small(2, transforms=(PRUNED,), start=start, health=Health(every=1, prompts=1))
        run = prepared(settings, tmp_path)
        run.iterate()
        assert fingerprint(run.monitor._begun().denoiser) == fingerprint(begun.transformed(PRUNED).denoiser)


def test_a_target_that_averages_the_student_has_its_structure(tmp_path: Path) -> None:
    run = prepared(small(2, transforms=(PRUNED,), ema=0.5), tmp_path, Consistency())
    assert [len(net.backbone.blocks) for net in (*run.nets.values(), run.average)] == [2, 1, 1, 1]
    run.iterate()


def test_a_transformed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = small(4, transforms=(PRUNED,), save_every=2, ema=0.5)
    whole, halves = (prepared(settings, tmp_path) for _ in range(2))
    for run in (whole, whole, halves):
        run.iterate()
    halves.restore(Checkpoint.open(whole.state().save(tmp_path / "checkpoints")))
    for run in (whole, whole, halves, halves):
        run.iterate()
    prints = [(fingerprint(run.nets.roles["student"]), fingerprint(run.average)) for run in (whole, halves)]
    assert prints[0] == prints[1] and whole.step == halves.step == 4


# --- an earlier student, and stages ------------------------------------------------------------------------------------


def test_a_start_has_some_of_the_transforms_and_gets_the_rest(teacher: Path, tmp_path: Path) -> None:
    """What an earlier student has already is not done twice."""
    scalar = ScalarInput(name="guidance", default=1.0)
    for had in ((), (PRUNED,), (PRUNED, scalar)):
        first = tiny_model(seed=3).transformed(*had)
        first.save(tmp_path / "first")
        settings = small(1, start=str(tmp_path / "first"), transforms=(PRUNED, scalar), health=None)
        student = prepare(VideoModel.from_pretrained(teacher), DMD, DATA, settings, tmp_path / "run").nets.student
        assert torch.equal(raw(student), raw(tiny_model(seed=3).transformed(PRUNED, scalar).denoiser))
    settings = replace(settings, transforms=(scalar,))
    with pytest.raises(
        ValueError, match=r"no student of this teacher: it has the transforms \[Pruned.*settings\.transforms"
    ):
        require_possible(DMD, settings, read_card(teacher), None)


def test_stages_go_on_with_a_transformed_student(teacher: Path, tmp_path: Path) -> None:
    first = Stage(
        model=Pretrained(source=str(teacher)), method=Consistency(), data=DATA, settings=small(1, transforms=(PRUNED,))
    )
    second = Stage(method=DMD, data=DATA, settings=small(1, transforms=(PRUNED,)))
    student = Pipeline(stages={"one": first, "two": second}).run(tmp_path / "run", quiet=True)
    assert student.card.transforms == (PRUNED,)
    forgotten = replace(second, settings=small(1))
    with pytest.raises(RecipeError, match=r"stage two.*transforms.*settings\.transforms"):
        Pipeline(stages={"one": first, "two": forgotten}).check()


# --- what is planned, and what cannot be -------------------------------------------------------------------------------


def test_a_plan_knows_the_student(teacher: Path) -> None:
    """Its weights, what of it is trained, the network under its adapters, and what it saves."""
    card, held = read_card(teacher), dict[str, dict[str, Holding]]()
    made: dict[str, Outline] = {}
    for case, others in {"plain": ((), {}), **CASES}.items():
        settings = small(2, batch=1, health=None, transforms=others[0], **others[1])
        made[case] = Outline.of(card, DMD, settings, FRAMES)
        held[case] = {holding.role: holding for holding in made[case]._holdings()}
    for case, (transforms, others) in CASES.items():
        run, roles = prepared(made[case].settings, Path("nowhere")), held[case]
        assert roles["student"].trained == sum(p.numel() for p in run.nets.student.parameters())
        assert roles["student"].network == ", ".join(["VideoDiT", *(type(x).__name__ for x in transforms)])
        alike = {
            "gathered": 0,
            "blocks": 0,
            "idles": True,
        }  # with adapters its blocks may come when they run, and it stays
        assert replace(roles["teacher"], **alike) == replace(held["plain"]["teacher"], **alike)
        assert roles["teacher"].idles == (not others) and (roles["teacher"].blocks > 0) == bool(others)
        assert ("student's base" in roles) == bool(others)
        if others:
            assert roles["student's base"].weights == sum(x.nbytes for x in run.base.state_dict().values())
    assert made["pruned"]._flops(()) < made["plain"]._flops(()) <= made["branches"]._flops(())


@dataclass(frozen=True, kw_only=True)
class Stale(Method):
    """Copies the student into a network that began as the teacher."""

    cite = "nobody"

    def aux(self) -> dict[str, Role]:
        return {"stale": Copy("teacher")}

    def updates(self, step: int) -> Iterator[Update | Sync]:
        yield Update(("student",), lambda nets, batch, rng: iter(()))
        yield Sync("stale", "student")


@pytest.mark.parametrize(
    ("transforms", "others", "method", "words"),
    [
        ((Int8(),), {}, DMD, r"layers are Int8 and cannot be trained; set settings\.lora"),
        ((Pruned(blocks=(7,)),), {}, DMD, r"settings\.transforms: .*from 0 to 1, got \[7\]"),
        ((ScalarInput(name="g"),), {}, DMD, r"settings\.transforms: .*scalar 'g'; give ScalarInput a default"),
        (
            (PRUNED, Branches()),
            {"lora": LORA},
            DMD,
            r"settings\.transforms: Branches begins without effect, and with settings\.lora",
        ),
        ((PRUNED,), {}, Stale(), r"Stale copies weights of the student into the stale, and only one"),
        ((PRUNED,), {}, Progressive(stages=((2, 1), (1, 1))), r"student into the stage"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(
    teacher: Path, transforms: tuple[Transform, ...], others: dict[str, Any], method: Method, words: str
) -> None:
    settings = small(2, transforms=transforms, **others)
    with pytest.raises(ValueError, match=words):
        require_possible(method, settings, read_card(teacher), None)


def test_a_copy_of_eight_bits_is_not_trained(teacher: Path) -> None:
    """Nor where they are those of another model: AVDM2's critic begins as the image teacher. Adapters over it are."""
    small_ = tiny_model(7).transformed(Int8()).save(teacher.parent / "small")
    method = AVDM2(image_teacher=Pretrained(source=str(small_)), frames=2, rollout=TWO_GRIDS)
    with pytest.raises(ValueError, match=r"AVDM2 would train a \w+ whose layers are Int8 .* set settings\.lora"):
        require_possible(method, small(1), read_card(teacher), None)
    assert "student" in require_possible(method, small(1, lora=LORA), read_card(teacher), None)


def test_only_a_denoiser_is_transformed(teacher: Path) -> None:
    from fewstep.methods import Reconstruction

    with pytest.raises(ValueError, match=r"settings\.transforms is for denoisers, and Reconstruction trains the codec"):
        require_possible(Reconstruction(), small(1, transforms=(PRUNED,)), read_card(teacher), None)


def test_transforms_of_a_student_are_strict_in_a_recipe(teacher: Path, tmp_path: Path) -> None:
    text = (
        f"model: {{type: Pretrained, source: {teacher}}}\nmethod: {{type: DMD2}}\n"
        "data: {type: WorldClips, num_frames: 4}\nsettings: {steps: 1, transforms: [%s]}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text % "{type: Pruned, blocks: [1]}")
    assert Recipe.load(tmp_path / "recipe.yaml").settings.transforms == (Pruned(blocks=(1,)),)
    (tmp_path / "recipe.yaml").write_text(text % "{type: Pruned, block: [1]}")
    with pytest.raises(RecipeError, match=r"settings\.transforms\[0\]\.block is unknown.*blocks"):
        Recipe.load(tmp_path / "recipe.yaml")
