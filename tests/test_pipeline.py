"""Recipes in stages: each starts where the one before ended, a stopped run goes on where it was, one chain says what happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep import Pipeline, Stage, VideoModel
from fewstep.core import RecipeError
from fewstep.engine.run import Run
from fewstep.methods import DMD2, PSO, Consistency, FlowMatching
from fewstep.models.bundle import read_card
from fewstep.models.source import Pretrained, Previous, Scratch
from fewstep.models.spec import Spec
from fewstep.pipeline import read
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import FRAMES, TWO_GRIDS, small, tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
DATA = WorldClips(num_frames=FRAMES)
SETTINGS = small(2, save_every=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model().save(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def two(teacher: Path) -> Pipeline:
    first = Stage(model=Pretrained(source=str(teacher)), method=Consistency(), data=DATA, settings=SETTINGS)
    second = Stage(method=DMD2(critic_updates=1, rollout=TWO_GRIDS), data=DATA, settings=SETTINGS)
    return Pipeline(stages={"consistency": first, "dmd2": second})


@pytest.fixture(scope="module")
def whole(two: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    two.run(folder, quiet=True)
    return folder


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of the iterations that are done, from now on."""
    seen: list[str] = []
    real = Run.iterate

    def iterate(run: Run) -> None:
        real(run)
        seen.append(run.output.name)

    monkeypatch.setattr(Run, "iterate", iterate)
    return seen


def tensors(folder: Path) -> bytes:
    return (folder / "student" / "denoiser.safetensors").read_bytes()


class Stopped(Exception):
    """The plug was pulled."""


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Pull the plug before iteration `number + 1`, counted over all stages."""
    real, done = Run.iterate, [0]

    def iterate(run: Run) -> None:
        if done[0] == number:
            raise Stopped
        done[0] += 1
        real(run)

    monkeypatch.setattr(Run, "iterate", iterate)


def test_a_stage_starts_where_the_one_before_ended(two: Pipeline, whole: Path, teacher: Path, tmp_path: Path) -> None:
    by_hand = Recipe(
        model=Pretrained(source=str(teacher)), method=two.stages["dmd2"].method, data=DATA,
        settings=replace(SETTINGS, start=str(whole / "1-consistency" / "student")),
    )  # fmt: skip
    by_hand.run(tmp_path / "by_hand", quiet=True)
    assert tensors(tmp_path / "by_hand") == tensors(whole / "2-dmd2")
    replace(by_hand, settings=SETTINGS).run(tmp_path / "fresh", quiet=True)
    assert tensors(tmp_path / "fresh") != tensors(tmp_path / "by_hand")
    assert two.complete(whole, quiet=True) == whole / "2-dmd2" / "student"  # nothing is run again


def test_one_chain_of_provenance(whole: Path, teacher: Path) -> None:
    first, last = (read_card(whole / folder / "student") for folder in ("1-consistency", "2-dmd2"))
    said = last.provenance
    assert said["method"] == "DMD2" and said["student.method"] == "Consistency"
    assert said["student.recipe"] == first.provenance["recipe"] == Recipe.load(whole / "1-consistency").hash
    assert said["student"].endswith(first.fingerprints["denoiser"])
    assert said["teacher"] == said["student.teacher"]
    assert said["teacher"].endswith(read_card(teacher).fingerprints["denoiser"])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stopped_run_goes_on_bit_for_bit(
    two: Pipeline, whole: Path, tmp_path: Path, number: int, request: pytest.FixtureRequest
) -> None:
    """Stopped within the first stage, between the two, within the second."""
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        stop_after(patch, number)
        with pytest.raises(Stopped):
            two.run(tmp_path / "run", quiet=True)
    iterations = request.getfixturevalue("iterations")
    two.run(tmp_path / "run", quiet=True)
    assert iterations == (["1-consistency"] * 2 + ["2-dmd2"] * 2)[number:]
    for folder in ("1-consistency", "2-dmd2"):
        assert tensors(tmp_path / "run" / folder) == tensors(whole / folder)


def test_a_finished_stage_is_not_run_again(two: Pipeline, whole: Path, iterations: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("1-*/**/*") if path.is_file()}
    student = two.run(whole, quiet=True)
    assert not iterations and student.card.provenance["method"] == "DMD2"
    changed = replace(two, stages=two.stages | {"dmd2": replace(two.stages["dmd2"], settings=small(4))})
    with pytest.raises(RecipeError, match=r"2-dmd2 holds run .*settings\.steps: 2 -> 4"):
        changed.run(whole, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("1-*/**/*") if path.is_file()}
    two.save(whole)
    with pytest.raises(RecipeError, match="recipe without stages"):
        two.run(whole / "2-dmd2", quiet=True)


def test_what_cannot_work_in_the_last_stage_is_refused_before_the_first(two: Pipeline, tmp_path: Path) -> None:
    last, other = two.stages["dmd2"], tiny_model(depth=1).save(tmp_path / "other")
    for wrong, words in (
        ({"model": Pretrained(source=str(other))}, "stage dmd2: .*does not match this teacher: its denoiser"),
        (
            {
                "data": WorldClips(num_frames=16),
                "settings": small(3, ema=0.5, optim={"judge": SETTINGS.optim["student"]}),
            },
            "judge",
        ),
    ):
        pipeline = replace(two, stages=two.stages | {"dmd2": replace(last, **wrong)})
        with pytest.raises(RecipeError, match=words):
            pipeline.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        (
            "flash_dmd",
            "reinforcement.method.distillation.adversary.layers",
            "[2, 9]",
            r"layers must be from -6 to 5.*\[2, 9\]",
        ),
        (
            "apt",
            "adversarial.method.adversary.layers",
            "[99]",
            r"the discriminator of .* reads .* eyes: layers must be from -6 to 5",
        ),
        ("tmd", "dmd2.method.adversary.layers", "[99]", "layers must be from -6 to 5"),
    ],
)
def test_a_discriminator_without_its_blocks_is_refused_before_the_first_stage(
    name: str, key: str, value: str, words: str
) -> None:
    stage = key.partition(".")[0]
    with pytest.raises(RecipeError, match=f"stage {stage}: .*{words}"):
        read(f"leaderboard/{name}", [(f"stages.{key}", value)]).check()


def test_stages_on_several_parts_of_the_prompts_are_refused() -> None:
    other = [("stages.dmd_gan.data.part.index", "2")]
    with pytest.raises(
        RecipeError, match=r"stage dmd trains on part 0 .*dmd_gan on part 2; .*--stages\.dmd\.data\.part\.index 2"
    ):
        read("world/msd", other).check()
    read("world/msd", [*other, ("stages.dmd.data.part.index", "2")]).check()


def test_a_last_stage_that_compares_clips_of_one_is_refused_before_the_first() -> None:
    within = "stages.reinforcement."
    alone = [(within + "method.distillation.adversary.mismatched", "true"), (within + "settings.batch", "1")]
    with pytest.raises(
        RecipeError, match=r"stage reinforcement: .*Alternating compares .* at least settings\.batch: 2"
    ):
        read("leaderboard/flash_dmd", alone).check()
    read("leaderboard/flash_dmd", alone[:1]).check()
    read("leaderboard/flash_dmd", alone[1:]).check()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("pso", {"pso.method.rollout.shift": "1.0"}, "stage pso: PSO .*another grid"),
        ("pso", {"dmd2.method.rollout.mode": "ode"}, "stage pso: PSO .*another sampler .*Renoise.*DDIM"),
        ("pso", {"pso.method.rollout.grids": "[[1.0]]"}, "another grid"),
        ("pso", {"pso.model": "{type: Previous}", "pso.method.rollout.shift": "1.0"}, "another grid"),
        (
            "dmdr",
            {f"reinforcement.method.{each}.rollout.shift": "1.0" for each in ("distillation", "reinforcement")},
            "stage reinforcement: Alternating .*another grid",
        ),
        (
            "flash_dmd",
            {
                f"reinforcement.method.{each}.rollout.grids": "[[1.0], [1.0, 0.5]]"
                for each in ("distillation", "reinforcement")
            },
            "another grid",
        ),
    ],
)
def test_a_student_is_reinforced_as_it_was_distilled(name: str, changes: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read(f"leaderboard/{name}", [(f"stages.{key}", value) for key, value in changes.items()]).check()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pso", {"dmd2.method.rollout.shift": "2.0", "pso.method.rollout.shift": "2.0"}),
        ("pso", {"pso.model": "{type: Previous}"}),
        ("consistency_dmd2", {"dmd2.method.rollout.shift": "2.0"}),  # a distillation may have a sampler of its own
    ],
)
def test_a_sampler_may_be_that_of_the_student_or_of_a_new_distillation(name: str, changes: dict[str, str]) -> None:
    read(f"leaderboard/{name}", [(f"stages.{key}", value) for key, value in changes.items()]).check()


def test_a_start_is_reinforced_as_it_was_distilled(whole: Path, teacher: Path) -> None:
    """With settings.start, and where the student is the model of the recipe."""
    student = whole / "2-dmd2" / "student"
    settings = replace(small(1), start=str(student))
    begun = Recipe(model=Pretrained(source=str(teacher)), method=PSO(rollout=TWO_GRIDS), data=DATA, settings=settings)
    alone = replace(begun, model=Pretrained(source=str(student)), settings=small(1))
    fresh = replace(begun, method=PSO(), settings=small(1))
    for fits in (begun, alone, fresh):
        fits.check()
    for wrong in (begun, alone):
        with pytest.raises(ValueError, match="PSO improves a student at its own steps, .*another grid"):
            replace(wrong, method=PSO()).check()


def test_the_student_of_the_stage_before_may_be_the_teacher(two: Pipeline, teacher: Path, tmp_path: Path) -> None:
    """As asked for; and where the stage before made its model from nothing."""
    last = replace(two.stages["dmd2"], model=Previous())
    chain = replace(two, stages=two.stages | {"dmd2": last})
    first, second = chain.plan(tmp_path)
    assert second.recipe.model == Pretrained(source=str(first.folder / "student"))
    assert second.recipe.settings.start is None
    assert second.card.contract == first.recipe.method.contract(first.card.contract) != first.card.contract
    spec = Spec("VideoDiT", {"width": 24, "depth": 2, "heads": 2, "text_width": 16})
    model = Scratch(denoiser=spec, text=str(teacher), codec=str(teacher), num_frames=FRAMES)
    made = Stage(model=model, method=FlowMatching(), data=DATA, settings=SETTINGS)
    grown = Pipeline(stages={"teacher": made, "consistency": replace(two.stages["consistency"], model=None)})
    student = grown.run(tmp_path / "run", quiet=True)
    assert student.card.provenance["teacher.method"] == "FlowMatching"
    assert student.card.provenance["teacher"].endswith(
        read_card(tmp_path / "run/1-teacher/teacher").fingerprints["denoiser"]
    )


def test_a_pipeline_has_a_printed_form(two: Pipeline, tmp_path: Path) -> None:
    path = two.save(tmp_path / "two.yaml")
    assert read(path, []) == Pipeline.load(path) == two and Pipeline.load(path).hash == two.hash
    more = read(path, [("stages.dmd2.method.critic-updates", "2")])
    assert isinstance(more, Pipeline) and more.stages["dmd2"].method == DMD2(critic_updates=2, rollout=TWO_GRIDS)
    assert more.hash != two.hash
    first = replace(two.stages["dmd2"], model=two.stages["consistency"].model)
    either = [Pipeline(stages=dict(pairs)) for pairs in ([("a", first), ("b", first)], [("b", first), ("a", first)])]
    assert either[0] == either[1] and either[0].hash != either[1].hash  # dicts are equal whatever their order
    path.write_text(path.read_text().replace("    method:\n      type: DMD2", "    methd:\n      type: DMD2"))
    with pytest.raises(RecipeError, match=r"stages\.dmd2\.methd is unknown; did you mean method"):
        Pipeline.load(path)


def test_stages_that_mean_nothing_are_refused(two: Pipeline, tmp_path: Path) -> None:
    first, second = two.stages.values()
    for stages, words in (
        ({}, "at least one"),
        ({"dmd2": second}, "first stage, dmd2, has no stage before it"),
        ({"dmd2": replace(second, model=Previous())}, "first stage, dmd2"),
        ({"a/b": first}, "a word such as"),
        (
            {"a": first, "b": replace(second, settings=replace(SETTINGS, start="world"))},
            r"leave out its settings\.start",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Pipeline(stages=stages)
    with pytest.raises(RecipeError, match="Previous is for the second"):
        Recipe(model=Previous(), method=first.method, data=DATA, settings=SETTINGS).check()
    path = two.save(tmp_path / "two.yaml")
    with pytest.raises(RecipeError, match=r"has stages.*Pipeline"):
        Recipe.load(path)


def test_the_shipped_pipeline_is_planned_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.cli import main

    path = "world/consistency_dmd2"
    assert main(["explain", path]) == 0
    out = capsys.readouterr().out
    assert "stage 1 of 2: consistency" in out and "start: OUTPUT/1-consistency/student" in out
    assert (
        out.index("Latent Consistency") < out.index("stage 2 of 2: dmd2") < out.index("Improved Distribution Matching")
    )


def test_the_command_runs_all_stages(two: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.cli import main

    path, output = two.save(tmp_path / "two.yaml"), tmp_path / "run"
    assert main(["distill", str(path), "--output", str(output), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("stage 1 of 2, consistency") < out.index("stage 2 of 2, dmd2") and not output.exists()
    words = ["--quiet", "--allow-fallback", "--stages.dmd2.settings.steps", "1"]
    assert main(["distill", str(path), "--output", str(output), *words]) == 0
    assert str(output / "2-dmd2" / "student") in capsys.readouterr().out
    assert main(["watch", str(output), "--every", "0"]) == 0
    assert "2-dmd2" in capsys.readouterr().out
    saved = Pipeline.load(output)
    assert [stage.settings.steps for stage in saved.stages.values()] == [2, 1]
    assert all(stage.settings.allow_fallback for stage in saved.stages.values())
    assert json.loads((output / "2-dmd2" / "student" / "card.json").read_text())["role"] == "student"
    assert VideoModel.from_pretrained(output / "2-dmd2" / "student").card.contract.counts
