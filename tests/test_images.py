"""Image-to-video models are trained: every clip of a batch with its own image, in every call of every network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusers")

from PIL import Image
from torch import Tensor

from fewstep.cli import main
from fewstep.core import Batch, Cond, Rng
from fewstep.data import (
    Cut,
    Data,
    DataError,
    Latents,
    PairPlan,
    Preparation,
    Prompts,
    StoredPairs,
    Videos,
    make_pairs,
    prepare,
    read_prompts,
    read_video,
    remembered,
    to_floats,
    write_video,
)
from fewstep.data.images import PictureConditions
from fewstep.diffusion import Exact
from fewstep.engine import Health, Settings, train
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import require_possible
from fewstep.engine.run import Run
from fewstep.evaluate import Entry, Suite, sampling
from fewstep.methods import AVDM2, DMD2, BackwardSimulation, Consistency, FlowMatching, KnowledgeDistillation, Method
from fewstep.methods.rollouts import FromPairs
from fewstep.models import Denoiser, VideoModel
from fewstep.models.source import Diffusers, Pretrained
from fewstep.recipe import Recipe, distill
from fewstep.world.data import WorldClips
from tiny_models import COGVIDEOX_IMAGE, COGVIDEOX_IMAGE_SIZE, IMAGE, IMAGE_SIZE, shared

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CAPTIONS = ("a red ball", "a blue box", "a cat walks")
GRID = (1.0, 0.5)
DMD = DMD2(rollout=BackwardSimulation(grids=(GRID,)), critic_updates=1)
KD = KnowledgeDistillation(rollout=FromPairs(grids=(GRID,)))
PLAN = PairPlan(times=(*GRID, 0.0), steps=2)
HEALTH = Health(every=2, prompts=2, seeds=2)


@pytest.fixture(scope="module", params=[*IMAGE, *COGVIDEOX_IMAGE])
def folder(request: pytest.FixtureRequest) -> Path:
    return shared(request.param)


@pytest.fixture
def source(folder: Path) -> Diffusers:
    size = COGVIDEOX_IMAGE_SIZE if folder.name.startswith("cogvideox") else IMAGE_SIZE
    return Diffusers(source=str(folder), text_dtype="float32", **size)


@pytest.fixture
def model(source: Diffusers) -> VideoModel:
    return source.load()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions with a first and a last picture each."""
    folder, rows = tmp_path_factory.mktemp("pictures"), ["caption,image,last_image"]
    for number, caption in enumerate(CAPTIONS):
        for end in ("first", "last"):
            drawn = 255 * Rng(number).rand((40, 80, 3), end)
            Image.fromarray(drawn.to(torch.uint8).numpy()).save(folder / f"{number}-{end}.png")
        rows.append(f"{caption},{number}-first.png,{number}-last.png")
    (folder / "both.csv").write_text("\n".join(rows))
    (folder / "first.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, lines = tmp_path_factory.mktemp("videos"), []
    for number, caption in enumerate(CAPTIONS):
        coarse = 2 * Rng(number).rand((3, 9, 8, 10), "video") - 1
        write_video(folder / f"{number}.mp4", coarse.repeat_interleave(8, 2).repeat_interleave(8, 3))
        lines.append(json.dumps({"video": f"{number}.mp4", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def listed(model: VideoModel, pictures: Path) -> Path:
    return pictures / ("both.csv" if model.part("image").needs_last else "first.csv")


def prepared(model: VideoModel, videos: Path, output: Path) -> Latents:
    cut = Cut(num_frames=model.card.num_frames, height=model.card.height, width=model.card.width)
    plan = Preparation(cut=cut, storage="float32", shard_size=2)
    prepare(videos, output, model.codec, plan, image=model.part("image"))
    return Latents(path=str(output))


def size_of(model: VideoModel) -> tuple[int, int]:
    return model.card.height, model.card.width


def batch(data: Data, model: VideoModel, size: int = 3) -> Batch:
    return data.open(model, frozenset({"prompts"}) | (data.provides & {"x0"})).batch(size, Rng(0, step=1))


def assert_conditions(batch: Batch, expected: dict[str, tuple[Cond, Cond]]) -> None:
    """Each row is told of its own caption and pictures, and so is its unconditional half, but of the negative prompt."""
    assert sorted(batch.prompts) == sorted(CAPTIONS)
    for row, prompt in enumerate(batch.prompts):
        one = slice(row, row + 1)
        for made, wanted in zip((batch.cond[one], batch.uncond[one]), expected[prompt], strict=True):
            assert made.extra.keys() == wanted.extra.keys() and "image_latents" in made.extra
            for a, b in zip(made.tensors, wanted.tensors, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    images = batch.cond.extra["image_latents"]
    assert not torch.equal(images[0], images[1]) and not torch.equal(batch.cond.text[0], batch.uncond.text[0])


# --- data -----------------------------------------------------------------------------------------------------------------


def test_prompts_come_with_their_pictures(model: VideoModel, pictures: Path) -> None:
    table = listed(model, pictures)
    prompts: Any = read_prompts(table)
    size = size_of(model)
    expected = {prompt: model.conditions([prompt], **prompts.pictures(i, size)) for i, prompt in enumerate(prompts)}
    assert_conditions(batch(Prompts(path=str(table)), model), expected)


def test_clips_begin_with_their_own_frames(model: VideoModel, videos: Path, tmp_path: Path) -> None:
    expected = {}
    for number, caption in enumerate(CAPTIONS):
        frames = to_floats(read_video(videos / f"{number}.mp4", model.card.num_frames, size=size_of(model)))
        last = {"last_image": frames[:, -1]} if model.part("image").needs_last else {}
        expected[caption] = model.conditions([caption], frames[:, 0], **last)
    height, width = size_of(model)
    drawn = Videos(path=str(videos), num_frames=model.card.num_frames, height=height, width=width)
    assert_conditions(batch(drawn, model), expected)
    made = batch(prepared(model, videos, tmp_path / "out"), model)
    assert_conditions(made, expected)
    if model.part("image").args.get("reads") == "frame":  # the codec is causal: the image is the clip's first frame
        assert made.x0 is not None
        torch.testing.assert_close(made.cond.extra["image_latents"], made.x0[:, :, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", ["wan_image_experts"], indirect=True)
def test_a_row_may_have_a_last_picture(model: VideoModel, pictures: Path) -> None:
    first, both = (PictureConditions(model, read_prompts(pictures / f), 5)([1]) for f in ("first.csv", "both.csv"))  # type: ignore[arg-type]
    assert first["image_latents"][0, :4, -1].sum() == 0 and both["image_latents"][0, :4, -1].any()


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
def test_data_without_images_are_refused(
    source: Diffusers, model: VideoModel, pictures: Path, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    settings = Settings(steps=1)
    with pytest.raises(DataError, match="has no pictures, and .* is an image-to-video model; give a .csv"):
        distill(
            model=source,
            method=DMD,
            data=Prompts(path=str(tmp_path / "prompts.txt")),
            settings=settings,
            output=tmp_path,
        )
    with pytest.raises(DataError, match="has no pictures"):
        make_pairs(model, CAPTIONS, tmp_path / "pairs", PLAN)
    prepare(videos, tmp_path / "plain", model.codec, Preparation(cut=Cut(**IMAGE_SIZE)))
    with pytest.raises(DataError, match="has no images, and .* is an image-to-video model; make the folder again"):
        Latents(path=str(tmp_path / "plain")).check_card(model.card)
    data = prepared(model, videos, tmp_path / "out")
    data.check(model)
    torch.nn.init.zeros_(next(model.part("image").parameters()))
    with pytest.raises(DataError, match="holds images encoded by"):
        data.check(model)
    with pytest.raises(DataError, match="is a text-to-video model"):
        Prompts(path=str(pictures / "first.csv")).check_card(VideoModel.from_pretrained("world").card)


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
def test_data_that_never_have_images_are_refused(source: Diffusers) -> None:
    """By the card alone."""
    with pytest.raises(DataError, match="WorldClips has no images; use Videos, Latents"):
        Recipe(model=source, method=FlowMatching(), data=WorldClips(num_frames=5), settings=settings(1)).check()


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
def test_a_picture_is_encoded_once(model: VideoModel, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as there is room: then the oldest is forgotten, and comes back the same."""
    opened = Prompts(path=str(pictures / "first.csv")).open(model, frozenset({"prompts"}))
    calls, encode = [], model.part("image").encode
    monkeypatch.setattr(model.part("image"), "encode", lambda *given: calls.append(given) or encode(*given))
    once, again = (opened.batch(3, Rng(0, step=1)).cond.extra for _ in range(2))
    assert len(calls) == 3
    monkeypatch.setattr(remembered, "ROOM", 1)
    for _ in range(2):
        opened = Prompts(path=str(pictures / "first.csv")).open(model, frozenset({"prompts"}))
        later = opened.batch(3, Rng(0, step=1)).cond.extra
    assert len(calls) == 9
    for name, x in once.items():
        assert torch.equal(x, again[name]) and torch.equal(x, later[name])


@pytest.mark.parametrize("folder", ["wan_ends"], indirect=True)
def test_pictures_that_cannot_be_meant_are_refused(model: VideoModel) -> None:
    """Three for two clips, numbers of 0 to 255 or NaN, the wrong one of two, and more pictures than frames."""
    three = 2 * Rng(0).rand((3, 3, *size_of(model)), "pictures") - 1
    one, bad = three[0], torch.full_like(three[0], torch.nan)
    for image, last_image, message in (
        (three, one, "3 images for 2 clips: give one for all, or one for each"),
        (three, three[:2], "one of each; got 3 first, 2 last ones"),
        (one, one[:, :8], r"give last_image \(--last-image\), \[3, 32, 64\]; got \[3, 8, 64\]"),
        (127.5 * (one + 1), one, r"image is a picture of floating-point numbers in \[-1, 1\]"),
        ((127.5 * (one + 1)).to(torch.uint8), one, "x / 127.5 - 1 of 8 bits"),
        (one, bad, r"last_image is a picture of floating-point numbers in \[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.latents(CAPTIONS[:2], image=image, last_image=last_image)
    with pytest.raises(ValueError, match="a clip between two images has more frames than 1"):
        model.latents(CAPTIONS[:1], image=one, last_image=one, num_frames=1, force=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption,image\na cat,gone.png\n", "names .*gone.png, and there is no such file"),
        ("caption,image\na cat,\n", "needs a caption and an image"),
        ("caption,picture\na cat,x.png\n", "has no 'image'"),
        ("caption,image\n", "has no prompts"),
    ],
)
def test_a_list_without_its_pictures_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "list.csv")


# --- training -------------------------------------------------------------------------------------------------------------


def settings(steps: int, **more: Any) -> Settings:
    return Settings(**{"steps": steps, "batch": 2, "health": None, "ema": 0.0} | more)


WHOLE_RUNS = ("wan_image", "cogvideox15_image")
"""Families of which a run with checks and pictures is among the quick tests; shorter runs of all teach them by pairs."""


@pytest.mark.parametrize(
    "folder",
    [n if n in WHOLE_RUNS else pytest.param(n, marks=pytest.mark.slow) for n in (*IMAGE, *COGVIDEOX_IMAGE)],
    indirect=True,
)
def test_a_model_of_images_is_distilled(
    folder: Path, source: Diffusers, model: VideoModel, videos: Path, tmp_path: Path
) -> None:
    """With checks and pictures on the way; the student comes back from its folder and is told of images."""
    data = prepared(model, videos, tmp_path / "latents")
    chosen = settings(2, health=HEALTH, preview_every=2)
    student = distill(model=source, method=DMD, data=data, settings=chosen, output=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "health.json").is_file()
    names = ("image", "last_image")[: 2 if model.part("image").needs_last else 1]
    given = {name: 2 * Rng(0).rand((3, *size_of(model)), name) - 1 for name in names}
    loaded = VideoModel.from_pretrained(tmp_path / "run" / "student")
    clips = [m.latents(CAPTIONS[:1], **given) for m in (student, loaded)]
    assert torch.equal(*clips) and clips[0].isfinite().all()
    assert (clips[0] - model.latents(CAPTIONS[:1], **given, num_inference_steps=2)).abs().max() > 1e-5


def test_pairs_of_images_teach(model: VideoModel, source: Diffusers, pictures: Path, tmp_path: Path) -> None:
    """The stored endpoints are the teacher's own clips of the pictures, and come back with them."""
    table = listed(model, pictures)
    prompts: Any = read_prompts(table)
    make_pairs(model, prompts, tmp_path / "pairs", PLAN, batch=2)
    data = StoredPairs(path=str(tmp_path / "pairs"))
    size = size_of(model)
    expected = {prompt: model.conditions([prompt], **prompts.pictures(i, size)) for i, prompt in enumerate(prompts)}
    made = batch(data, model)
    assert_conditions(made, expected)
    row = made.prompts.index(CAPTIONS[1])
    visited = replace(model.card, contract=replace(model.card.contract, grid=Exact(grids=((*GRID, 0.0),))))
    alone = VideoModel(visited, model.parts).latents(
        CAPTIONS[1:2], image={k: v[row : row + 1] for k, v in made.cond.extra.items()}, seed=1, num_inference_steps=2
    )
    assert made.x0 is not None
    torch.testing.assert_close(made.x0[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    student = distill(model=source, method=KD, data=data, settings=settings(2), output=tmp_path / "run", quiet=True)
    assert student.fingerprint("denoiser") != model.fingerprint("denoiser")


@pytest.mark.parametrize("folder", ["wan_image", "wan_image_experts"], indirect=True)
def test_every_network_is_told_of_the_image_of_the_prompt(
    source: Diffusers, model: VideoModel, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In guidance the unconditional half has the images too. Fails where images are dropped or dealt to other rows."""
    data = Prompts(path=str(listed(model, pictures)))
    known = batch(data, model)
    calls: list[Cond] = []
    forward = Denoiser.forward

    def listening(self: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, kv: Any = None) -> Any:
        calls.append(cond)
        return forward(self, x_t, t, cond, kv)

    monkeypatch.setattr(Denoiser, "forward", listening)
    distill(model=source, method=DMD, data=data, settings=settings(1), output=tmp_path / "run", quiet=True)
    guided = 0
    for cond in calls:
        images = cond.extra["image_latents"]
        for row, text in enumerate(cond.text):
            own = [i for i, words in enumerate(known.cond.text) if torch.equal(words, text)]
            if not own:  # the negative prompt: after the rows that it guides
                assert torch.equal(text, known.uncond.text[0])
                own = [
                    i
                    for i, words in enumerate(known.cond.text)
                    if torch.equal(words, cond.text[row - len(images) // 2])
                ]
                guided += 1
            assert torch.equal(images[row], known.cond.extra["image_latents"][own[0]])
    assert guided == 2 and len(calls) >= 5


@pytest.mark.parametrize("folder", ["wan_ti2v_image"], indirect=True)
def test_the_known_frame_is_not_trained_on(model: VideoModel, videos: Path, tmp_path: Path) -> None:
    """Its prediction is the target itself, so no loss has a gradient there."""
    made = batch(prepared(model, videos, tmp_path / "out"), model)
    x0, network = made.require("x0"), model.denoiser
    eps, t = Rng(0).randn(x0.shape, "eps"), torch.tensor([0.2, 0.5, 0.9])
    prediction = network(network.path.add_noise(x0, eps, t), t, made.cond)
    torch.testing.assert_close(prediction.raw[:, :, :1], (eps - x0)[:, :, :1], atol=1e-4, rtol=1e-4)
    assert (prediction.raw[:, :, 1:] - (eps - x0)[:, :, 1:]).abs().mean() > 0.1


def test_single_frames_of_clips_that_begin_with_an_image_are_refused(model: VideoModel) -> None:
    """Before anything is loaded, and by the network, whoever asks it."""
    own, method = AVDM2(adversary=None), FlowMatching(image_fraction=0.5)
    for refused, role in ((method, "student"), (own, "teacher")):
        with pytest.raises(ValueError, match=f"shows single frames to the {role}, and"):
            require_possible(refused, settings(1), model.card, None)
    require_possible(FlowMatching(), settings(1), model.card, None)
    noise, cond = torch.zeros(1, *model.latent_shape()), model.blank_cond(1)
    with pytest.raises(
        ValueError, match="is an image-to-video network for whole clips, and was given latents of 1 frames"
    ):
        model.denoiser(noise[:, :, :1], torch.ones(1), cond)


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
@pytest.mark.parametrize(
    "method", [pytest.param(DMD, marks=pytest.mark.slow), FlowMatching()], ids=["DMD2", "FlowMatching"]
)
def test_a_killed_run_goes_on_to_the_same_student(
    method: Method, model: VideoModel, source: Diffusers, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, chosen = prepared(model, videos, tmp_path / "latents"), settings(2, save_every=1)
    whole = train(source.load(), method, data, chosen, tmp_path / "whole", quiet=True)
    iterate, calls = Run.iterate, []

    def dying(self: Run) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return iterate(self)

    monkeypatch.setattr(Run, "iterate", dying)
    with pytest.raises(KeyboardInterrupt):
        train(source.load(), method, data, chosen, tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    again = train(source.load(), method, data, chosen, tmp_path / "killed", quiet=True)
    for name, tensor in whole.weights("denoiser").items():
        assert torch.equal(tensor, again.weights("denoiser")[name]), name


LIKE_OTHERS = ("wan_image", "cogvideox_image")
"""Families whose networks read no more than those of `wan_ends` and `cogvideox15_image`."""


@pytest.mark.parametrize(
    "folder",
    [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in (*IMAGE, *COGVIDEOX_IMAGE)],
    indirect=True,
)
def test_a_run_on_images_is_planned_from_shapes(source: Diffusers, model: VideoModel) -> None:
    blank, told = model.blank_cond(2), model.conditions(CAPTIONS[:2], {**model.blank_cond(2).extra})[0]
    assert {k: v.shape for k, v in blank.extra.items()} == {k: v.shape for k, v in told.extra.items()}
    plan = Outline.of(source.card(), Consistency(), settings(2)).plan()  # three roles that see images, in one update
    assert plan.peak.bytes > 0 and plan.phases[0].reads >= {"student", "target", "teacher"}


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
def test_a_suite_of_prompts_alone_is_refused(model: VideoModel) -> None:
    with pytest.raises(ValueError, match="'teacher' is an image-to-video model, and a suite has only prompts"):
        sampling.prepare([Entry(name="teacher", model=model)], Suite())


@pytest.mark.parametrize("folder", ["wan_image"], indirect=True)
def test_the_commands_take_videos_and_pictures(
    folder: Path, model: VideoModel, videos: Path, pictures: Path, tmp_path: Path
) -> None:
    own = model.save(tmp_path / "model")
    assert main(["prepare", str(videos), "--output", str(tmp_path / "latents"), "--model", str(own), "--quiet"]) == 0
    assert batch(Latents(path=str(tmp_path / "latents")), model).cond.extra.keys() == {"image_latents", "image_states"}
    plan = ["--times", "1.0", "0.5", "0.0", "--steps", "2", "--quiet"]
    table, pairs = str(pictures / "first.csv"), str(tmp_path / "pairs")
    assert main(["pairs", table, "--output", pairs, "--model", str(own), *plan]) == 0
    chosen = replace(settings(1), steps=1)
    data = StoredPairs(path=str(tmp_path / "pairs"))
    distill(
        model=Pretrained(source=str(own)), method=KD, data=data, settings=chosen, output=tmp_path / "run", quiet=True
    )
