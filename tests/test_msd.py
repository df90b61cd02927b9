"""Multi-student distillation: parts of the prompts, small students that begin by imitation, and who makes which clip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fewstep import Pipeline, Recipe, Students, VideoModel
from fewstep.core import Batch, Cond, Rng, dump
from fewstep.core.build import RecipeError
from fewstep.core.shipped import shipped
from fewstep.data import ByCentroid, Data, DataError, Part, Partition, Prompts, Texts, centroids, parts
from fewstep.data.parts import embedding
from fewstep.diffusion import CFG, Uniform
from fewstep.engine import train
from fewstep.methods import DMD2, FlowMatching, Nets, TeacherForced
from fewstep.models.source import Diffusers, Pretrained
from fewstep.streaming import Video
from fewstep.world.data import WorldClips
from fewstep.world.grammar import ATTRIBUTES, Scene, describe, paraphrase, parse, sample_scenes
from fewstep.world.parts import ByAttribute
from support_engine import FRAMES, Everything, Sized, small, tiny_model
from support_gaussian import (
    ONE_STEP,
    SCALAR,
    AffineTableStudent,
    Asked,
    ExactCritic,
    GaussianTeacher,
    cond_of,
    f64,
    make_batch,
    normal,
    terms,
)
from tiny_models import shared

pytestmark = pytest.mark.usefixtures("single_thread")
DIRECTION = ByAttribute(attribute="direction", of=4)
TEXTS = ["red", "scarlet", "crimson", "blue", "navy", "azure"]


def encode(prompts: Sequence[str]) -> Cond:
    """Two clusters of states; the last token is padding, which must not count."""
    (prompt,) = prompts
    side = 10.0 * (TEXTS.index(prompt) > 2)
    text = torch.tensor([[[side, 0.1 * TEXTS.index(prompt)], [side, 0.0], [1e3 * (TEXTS.index(prompt) % 2), 0.0]]])
    return Cond(text, torch.tensor([[True, True, False]]))


# --- the partition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "of"), [("direction", 4), ("shape", 2), ("shape", 6), ("speed", 1), ("background", 3)]
)
def test_parts_cover_all_values_share_none_and_are_equal(attribute: str, of: int) -> None:
    rule, plain = ByAttribute(attribute=attribute, of=of), Scene.from_indices((0,) * 6)  # type: ignore[arg-type]
    values = ATTRIBUTES[attribute]
    parts = [rule.part(describe(replace(plain, **{attribute: value}))) for value in values]
    assert parts == sorted(parts) and set(parts) == set(range(of)), "consecutive values, and a cover"
    assert {parts.count(k) for k in range(of)} == {len(values) // of}


def test_a_part_does_not_depend_on_the_words() -> None:
    generator = torch.Generator().manual_seed(0)
    for scene in sample_scenes(60, generator):
        assert {DIRECTION.part(paraphrase(scene, generator)) for _ in range(4)} == {DIRECTION.part(describe(scene))}


@pytest.mark.parametrize("prompt", ["a red circle", "a red circle moves up and down"])
def test_a_prompt_that_belongs_to_no_part_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="belongs to no part: name one direction of right, up-right"):
        ByAttribute(attribute="direction", of=2).part(prompt)


def test_what_is_no_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="direction has 8 values.*write a divisor of 8"):
        ByAttribute(attribute="direction", of=3)
    with pytest.raises(ValueError, match="index is 4, and there are 4 parts, counted from 0"):
        Part(by=DIRECTION, index=4)
    with pytest.raises(ValueError, match="divided ByAttribute, not ByCentroid"):
        WorldClips(part=Part(by=ByCentroid(of=2, path="x"), index=0))


def test_centroids_part_prompts_by_what_they_mean(tmp_path: Path) -> None:
    file = tmp_path / "centroids.safetensors"
    found = centroids(TEXTS, encode, 2, file)
    rule = ByCentroid(of=2, path=str(file))
    parts = [rule.part(text, encode) for text in TEXTS]
    assert parts[:3] == parts[:1] * 3 and parts[3:] == [1 - parts[0]] * 3
    means = torch.stack(
        [torch.stack([embedding(encode([t])) for t in group]).mean(0) for group in (TEXTS[:3], TEXTS[3:])]
    )
    torch.testing.assert_close(found[[parts[0], 1 - parts[0]]], means)
    rows = [Part(by=rule, index=k).rows(TEXTS, encode) for k in range(2)]
    assert sorted(rows[0] + rows[1]) == list(range(6)) and not set(rows[0]) & set(rows[1])
    assert torch.equal(centroids(TEXTS, encode, 2, file), found), "a function of the seed"
    with pytest.raises(DataError, match="has 2 centroids of width 2; wanted are 3"):
        ByCentroid(of=3, path=str(file)).part("red", encode)
    for copies in (2, 40):
        with pytest.raises(DataError, match="there are 2 different prompts for 3 parts"):
            centroids(["red", "navy"] * copies, encode, 3, file)
    with pytest.raises(DataError, match="nowhere: no such file; make it with"):
        ByCentroid(of=2, path="nowhere").part("red", encode)
    with pytest.raises(DataError, match="none of 3 prompts belongs to part"):
        Part(by=rule, index=1 - parts[0]).rows(TEXTS[:3], encode)


def test_the_text_encoder_is_what_encodes(tmp_path: Path) -> None:
    """As many parts as prompts: the centroids are their embeddings, although all begin with the same letter."""
    model, prompts = tiny_model(), ["a red ball", "a blue box", "a green star"]
    found = centroids(prompts, model.text.encode, 3, tmp_path / "new" / "centroids.safetensors")
    wanted = torch.stack([embedding(model.text.encode([prompt])) for prompt in prompts])
    rule = ByCentroid(of=3, path=str(tmp_path / "new" / "centroids.safetensors"))
    parts = [rule.part(prompt, model.text.encode) for prompt in prompts]
    assert sorted(parts) == [0, 1, 2] and not found.requires_grad
    torch.testing.assert_close(found[parts], wanted)


def test_prompts_go_where_those_of_training_went(tmp_path: Path) -> None:
    """Also with states of the training data, which come without padding from a folder."""
    model, scenes = tiny_model(), sample_scenes(40, torch.Generator().manual_seed(2))
    prompts, file = sorted({describe(scene) for scene in scenes}), tmp_path / "centroids.safetensors"
    centroids(prompts, model.text.encode, 3, file)
    rule = ByCentroid(of=3, path=str(file))
    routes = Students(by=rule, students=(model, tiny_model(1), tiny_model(2))).route(prompts)
    assert set(routes) == {0, 1, 2}
    for cache in ("", str(tmp_path / "texts")):
        texts = Texts(model, frozenset({"prompts"}), cache, prompts)
        rows = [Part(by=rule, index=index).rows(prompts, texts.encode) for index in range(3)]
        assert rows == [[row for row, its in enumerate(routes) if its == index] for index in range(3)]


# --- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [0, 24])
def test_world_clips_of_a_part_are_of_that_part_alone(pool: int) -> None:
    model, needs = tiny_model(), frozenset({"prompts", "x0"} | (set() if pool else {"labels"}))
    seen = set()
    for index in range(4):
        data = WorldClips(num_frames=FRAMES, pool=pool, part=Part(by=DIRECTION, index=index))
        batches = [data.open(model, needs).batch(12, Rng(0, step=step)) for step in range(2)]
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        assert {DIRECTION.part(prompt) for prompt in prompts} == {index}
        seen |= {parse(prompt).direction for prompt in prompts}
        if not pool:
            labels = [tuple(row) for batch in batches for row in batch.labels.tolist()]  # type: ignore[union-attr]
            assert labels == [parse(prompt).to_indices() for prompt in prompts], "clips of the prompts"
    assert seen == set(ATTRIBUTES["direction"])


def test_prompts_of_a_file_are_divided_and_each_is_drawn_once_per_epoch(tmp_path: Path) -> None:
    scenes = sample_scenes(40, torch.Generator().manual_seed(1))
    lines = sorted({describe(scene) for scene in scenes})
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    drawn = []
    for index in range(4):
        data = Prompts(path=str(tmp_path / "prompts.txt"), part=Part(by=DIRECTION, index=index))
        source = data.open(tiny_model(), frozenset({"prompts"}))
        own = [line for line in lines if DIRECTION.part(line) == index]
        epoch = source.batch(len(own), Rng(0)).prompts
        assert sorted(epoch) == own
        drawn += epoch
    assert sorted(drawn) == lines


# --- fixed points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_each_student_reaches_the_fixed_point_of_its_own_condition(scale: float) -> None:
    """Two conditions, a student for each: the guided mean of its class, which one student for both could not have."""
    means = f64(0.1, -0.6, 0.9)
    for label in (1, 2):
        student = AffineTableStudent((1.0,)).fill([(0.4, 0.0)])
        nets = Nets({"student": student, "teacher": GaussianTeacher(means, 0.4), "critic": _Critic(student)})
        method, optimiser = (
            DMD2(rollout=ONE_STEP, guidance=CFG(scale=scale)),
            torch.optim.Adam([student.offset], lr=0.02),
        )
        batch = Batch(cond_of(label, 16), cond_of(0, 16), SCALAR)
        for step in range(400):
            optimiser.zero_grad()
            terms(method.student_loss(nets, batch, Rng(0, step)))["matching"].backward()
            optimiser.step()
        fixed = 0.1 + scale * (means[label].item() - 0.1)
        assert abs(student.offset.item() - fixed) < 2e-3


class _Critic(ExactCritic):
    """Knows its student's samples, whatever the condition."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond, *rest: object):  # type: ignore[no-untyped-def, override]
        return super().forward(x_t, t, cond_of(1, len(cond)))


# --- a smaller student begins by imitation --------------------------------------------------------------------------------


def test_a_small_student_is_regressed_on_what_the_teacher_predicts() -> None:
    """At the teacher's own weights the loss is 0; the target is not the clip."""
    large, other = GaussianTeacher(f64(-0.2, 0.7), 0.4), GaussianTeacher(f64(0.5, -0.3), 0.4)
    method = FlowMatching(imitated=Sized(width=36), density=Uniform(low=0.2, high=0.8), cond_drop=0.5)
    batch = make_batch(64, x0=normal(64))
    equal = Nets({"student": Asked(GaussianTeacher(large.means.data, 0.4)), "imitated": Asked(large)})
    assert terms(method.student_loss(equal, batch, Rng(0)))["flow"].item() < 1e-20
    (mine,), (its,) = equal.student.questions, equal.imitated.questions
    assert torch.equal(mine.x_t, its.x_t) and torch.equal(mine.t, its.t) and mine.labels == its.labels
    assert set(mine.labels) == {0, 1} and mine.grad and not its.grad
    nets = Nets({"student": Asked(other), "imitated": Asked(large)})
    loss = terms(method.student_loss(nets, batch, Rng(0)))["flow"]
    (seen,) = nets.student.questions
    cond = Cond(torch.tensor(seen.labels).float()[:, None, None], torch.ones(64, 1, dtype=torch.bool))
    error = other(seen.x_t, seen.t, cond).raw - large(seen.x_t, seen.t, cond).raw
    torch.testing.assert_close(loss, error.square().mean())
    costs = {work.role: work.forwards for work in method.cost()}
    assert costs == {"student": 3, "imitated": 1}


def test_imitation_of_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="imitated on whole clips"):
        FlowMatching(imitated=Sized(width=36), history=TeacherForced())


def test_a_small_network_imitates_a_larger_one_in_a_run(tmp_path: Path) -> None:
    made = train(
        Sized(width=12).load(), FlowMatching(imitated=Sized(width=36)), Everything(), small(2), tmp_path, quiet=True
    )
    assert made.card.role == "teacher" and made.denoiser.backbone.widths[0] == 12
    assert made.card.provenance["imitated"].startswith("tiny ")


# --- who makes which clip -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Halves(Partition):
    """Long prompts and short ones."""

    def part(self, prompt: str, encode: object = None) -> int:
        return int(len(prompt) > 3)


def clips(students: Students, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
    return torch.cat([students.students[k]([p], seed=[s]) for k, p, s in zip(students.route(prompts), prompts, seeds)])


def test_each_prompt_gets_the_clip_of_its_student() -> None:
    students, prompts = Students(by=Halves(of=2), students=(tiny_model(1), tiny_model(2))), ["a", "long", "b", "longer"]
    assert students.route(prompts) == [0, 1, 0, 1]
    torch.testing.assert_close(students(prompts, seed=[5, 3, 5, 1]), clips(students, prompts, [5, 3, 5, 1]))
    torch.testing.assert_close(students(prompts, seed=7), clips(students, prompts, [7, 8, 9, 10]))
    assert not torch.equal(students(["a"]), students(["long"])) and len(students(["b"], seed=2)) == 1
    with pytest.raises(ValueError, match="2 parts and 1 students; give one student per part"):
        Students(by=Halves(of=2), students=(tiny_model(),))
    with pytest.raises(ValueError, match="there are 2 prompts and 1 seeds"):
        students(["a", "b"], seed=[1])
    with pytest.raises(ValueError, match="prompts is one text"):
        students("long")
    other = tiny_model()
    other = VideoModel(replace(other.card, fps=4), other.parts)
    with pytest.raises(ValueError, match="train them alike"):
        Students(by=Halves(of=2), students=(tiny_model(), other))


def test_each_student_is_told_of_the_images_of_its_own_prompts() -> None:
    size, prompts, seeds = {"num_frames": 5, "height": 32, "width": 32}, ["a", "long", "b", "longer"], (5, 6, 7, 8)
    model = Diffusers(source=str(shared("wan_image")), text_dtype="float32", **size).load()
    students = Students(by=Halves(of=2), students=(model, model))
    images = 2 * Rng(0).rand((4, 3, 32, 32), "images") - 1
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    wanted = torch.cat([model([p], seed=[s], image=i, **options) for p, s, i in zip(prompts, seeds, images)])
    torch.testing.assert_close(students(prompts, seed=seeds, image=images, **options), wanted, atol=1e-4, rtol=0)
    same = students(prompts[:2], seed=seeds[:2], image=images[0], **options)
    torch.testing.assert_close(same[1:], model(["long"], seed=[6], image=images[0], **options), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="image has 3 entries for 4 prompts; give one for all, or one for each"):
        students(prompts, image=images[:3], **options)


def test_each_student_begins_with_the_videos_of_its_own_prompts() -> None:
    students, prompts = Students(by=Halves(of=2), students=(tiny_model(1), tiny_model(2))), ["a", "long", "b"]
    latents = Rng(0).randn((3, *tiny_model().latent_shape()), "videos")
    given = [Video(lambda _, row=row: latents[row : row + 1], 0.7) for row in range(3)]  # type: ignore[misc]
    wanted = [students.students[k]([p], seed=[r], video=given[r]) for r, (k, p) in enumerate(zip((0, 1, 0), prompts))]
    made = students(prompts, seed=(0, 1, 2), video=Video(lambda _: latents, 0.7))
    torch.testing.assert_close(made, torch.cat(wanted))
    cond, null = tiny_model().conditions(["x", "y", "z"])
    negative = students(prompts, seed=(0, 1, 2), negative=cond)
    assert not torch.equal(negative, students(prompts, seed=(0, 1, 2), negative=null))
    alone = students.students[1](prompts[1:2], seed=[1], negative=cond[1:2])
    torch.testing.assert_close(negative[1:2], alone)


def made_of(folder: Path, part: Part, model: VideoModel, **told: Part) -> Path:
    """A folder as a run on `part` leaves it; `told`: the parts of other models in its provenance."""
    data = {f"{of}.data settings": dump(WorldClips(part=its), Data) for of, its in told.items()}
    base = Recipe(
        model=Pretrained(), method=DMD2(rollout=ONE_STEP), data=Prompts(path="x", part=part), settings=small(1)
    )
    data["data settings"] = dump(base.data, Data)
    provenance = {key: json.dumps(value, sort_keys=True) for key, value in data.items()}
    model.with_card(provenance=provenance, name=folder.name).save(folder)
    base.save(folder)
    return folder


def test_students_have_all_but_the_denoiser_in_common(tmp_path: Path) -> None:
    model = Diffusers(source=str(shared("wan_image")), text_dtype="float32").load()
    runs = [made_of(tmp_path / f"{k}", Part(by=DIRECTION, index=k), model) for k in range(4)]
    opened = Students.open(*runs).students
    for student in opened[1:]:
        assert student.parts.keys() == model.parts.keys() == opened[0].parts.keys() and "image" in model.parts
        assert all((student.parts[name] is opened[0].parts[name]) == (name != "denoiser") for name in student.parts)


def test_students_of_several_models_are_refused(tmp_path: Path) -> None:
    rule = ByAttribute(attribute="size", of=2)
    runs = [made_of(tmp_path / f"{k}", Part(by=rule, index=k), tiny_model(k)) for k in range(2)]
    with pytest.raises(ValueError, match="1 has another codec than .*0; train both from one model"):
        Students.open(*runs)


def test_a_student_of_stages_on_several_parts_is_refused(tmp_path: Path) -> None:
    """Its second stage began with the student of another part; that of a teacher that has parts of its own is none."""
    rule, other = ByAttribute(attribute="size", of=2), Part(by=DIRECTION, index=3)
    first, second = (Part(by=rule, index=index) for index in range(2))
    good = made_of(tmp_path / "0", first, tiny_model(), student=first, teacher=other)
    assert len(Students.open(good, made_of(tmp_path / "1", second, tiny_model())).students) == 2
    mixed = made_of(tmp_path / "mixed", second, tiny_model(), **{"student.student": first})
    with pytest.raises(ValueError, match="mixed was trained on part 1, and a stage before on part 0; train it again"):
        Students.open(good, mixed)


def test_students_of_centroids_that_were_made_again_are_refused(tmp_path: Path) -> None:
    base, file = tiny_model().save(tmp_path / "base"), tmp_path / "centroids.safetensors"
    prompts, runs = ["a red ball", "a blue box"], []
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    centroids(prompts, tiny_model().text.encode, 2, file)
    kept = file.read_bytes()
    for index in range(2):
        part = Part(by=ByCentroid(of=2, path=str(file)), index=index)
        recipe = Recipe(
            model=Pretrained(source=str(base)),
            method=DMD2(critic_updates=1, rollout=ONE_STEP),
            data=Prompts(path=str(tmp_path / "prompts.txt"), part=part),
            settings=small(1),
        )
        runs.append(recipe.complete(tmp_path / f"{index}"))
    assert sorted(Students.open(*runs).route(prompts)) == [0, 1]
    centroids(["a red ball", "a green star"], tiny_model().text.encode, 2, file)
    with pytest.raises(ValueError, match="was trained with another partition .* put back the file"):
        Students.open(*runs)
    shutil.rmtree(runs[1])
    centroids(prompts, tiny_model().text.encode, 2, file, seed=1)
    with pytest.raises(ValueError, match="partition"):  # nor does a stopped run go on with it
        recipe.complete(tmp_path / "1")
    file.write_bytes(kept)
    parts._read.cache_clear()
    runs[1] = recipe.complete(tmp_path / "1")
    parts._read.cache_clear()
    assert len(Students.open(*runs).students) == 2


def test_students_of_runs_know_their_parts(tmp_path: Path) -> None:
    base = tiny_model().save(tmp_path / "base")
    rule, runs = ByAttribute(attribute="size", of=2), []
    for index in range(2):
        data = WorldClips(num_frames=FRAMES, part=Part(by=rule, index=index))
        method = DMD2(critic_updates=1, rollout=ONE_STEP)
        recipe = Recipe(model=Pretrained(source=str(base)), method=method, data=data, settings=small(1, seed=index))
        runs.append(recipe.complete(tmp_path / f"{index}"))
    students = Students.open(runs[1], runs[0])
    prompts = [
        "a large red ring moves slowly up over a navy background",
        "a small red ring moves slowly up over a navy background",
    ]
    assert students.by == rule and students.route(prompts) == [1, 0]
    alone = [VideoModel.from_pretrained(runs[k]) for k in range(2)]
    assert [s.fingerprint("denoiser") for s in students.students] == [s.fingerprint("denoiser") for s in alone]
    assert students.students[0].text is students.students[1].text
    expected = torch.cat([alone[1](prompts[:1], seed=[4]), alone[0](prompts[1:], seed=[5])])
    torch.testing.assert_close(students(prompts, seed=4), expected)
    later = replace(recipe, settings=small(1, start=str(runs[0]))).complete(tmp_path / "later")
    with pytest.raises(ValueError, match="was trained on part 1, and a stage before on part 0"):
        Students.open(runs[0], later)
    with pytest.raises(
        ValueError, match=r"students of parts \[0\], and there are 2 parts; give each part's student once"
    ):
        Students.open(runs[0])
    with pytest.raises(ValueError, match="so nobody knows its part"):
        Students.open(base, runs[1])
    with pytest.raises(ValueError, match="give the folder of a run for each part"):
        Students.open()
    whole = Recipe(
        model=Pretrained(source=str(base)), method=method, data=WorldClips(num_frames=FRAMES), settings=small(1)
    )
    with pytest.raises(ValueError, match=r"trained on all prompts; give students whose recipes have a data\.part"):
        Students.open(whole.complete(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["world/msd", "world/msd_small"])
def test_the_recipes_can_be_run(name: str) -> None:
    """Their stages fit each other, also where the teacher of the third is what the first will make; and each has its part."""
    index = Part(by=DIRECTION, index=2)
    path = shipped()[name]
    stages = Pipeline.load(path).stages
    made = Pipeline.load(path, [(f"stages.{stage}.data.part.index", "2") for stage in stages])
    made.check()
    assert [stage.data.part for stage in made.stages.values()] == [index] * len(stages)  # type: ignore[attr-defined]


def test_parts_are_strict_in_a_recipe(tmp_path: Path) -> None:
    text = (
        "model: {type: Pretrained}\nmethod: {type: DMD2}\nsettings: {steps: 1}\n"
        "data: {type: WorldClips, part: {by: {type: ByAttribute, attribute: %s, of: 2}, index: 1}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text % "shape")
    assert Recipe.load(tmp_path / "recipe.yaml").data.part == Part(by=ByAttribute(attribute="shape", of=2), index=1)  # type: ignore[attr-defined]
    (tmp_path / "recipe.yaml").write_text(text % "shap")
    with pytest.raises(RecipeError, match="shape"):
        Recipe.load(tmp_path / "recipe.yaml")
