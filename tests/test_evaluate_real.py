"""Evaluation beside real clips: extractors by path, CLIPScore, and the protocol of AVDM2 from videos to the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.data import DataError, write_video
from fewstep.data.video import cover, to_floats, to_pixels
from fewstep.diffusion import Contract, Exact, Renoise
from fewstep.evaluate import Entry, RealClips, Report, Suite, details, evaluate, load_report, table, write_report
from fewstep.evaluate.cases import Cases
from fewstep.evaluate.features.extractors import feature_map
from fewstep.evaluate.inputs import as_read
from fewstep.evaluate.sampling import ask
from fewstep.metrics import frechet
from fewstep.models import Card, ClipFeatures, VideoModel
from fewstep.world.grammar import parse, world_prompts
from fewstep.world.renderer import Variation, render
from support_evaluate import guided_teacher

CPU = torch.device("cpu")
FRAMES, SIDE = 16, 32


class I3D(nn.Module):
    """What everybody's I3D accepts: it would rescale bytes, resize and give logits if it were told to."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert list(x.shape[1:]) == [3, 16, 224, 224] and x.abs().max() <= 1
        assert return_features and not rescale and not resize
        coarse = nn.functional.adaptive_avg_pool3d(x, (2, 1, 1)).flatten(1)
        change = (x[:, :, 1:] - x[:, :, :-1]).abs().mean((2, 3, 4))
        return torch.cat([coarse, 10 * change], 1)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


class Unpooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0]


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(I3D(), tmp_path_factory.mktemp("extractor") / "i3d_torchscript.pt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights with a vocabulary of single letters, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(words) - 2, len(words) - 1
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(words), "max_position_embeddings": 77, "bos_token_id": start, "eos_token_id": end,
        "pad_token_id": end,
    }  # fmt: skip
    vision = sizes | {"image_size": 24, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 videos of the built-in world, twice as large, with their captions; one more that cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    for i, prompt in enumerate(dict.fromkeys(world_prompts(14, 0.0, 5))):
        frames = render([parse(prompt)], Variation.sample(1, torch.Generator().manual_seed(i)), FRAMES)[0]
        write_video(folder / f"{i:02d}.mp4", torch.cat([frames, frames], 1), scale=2)
        (folder / f"{i:02d}.txt").write_text(prompt)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a caption that must not be asked for")
    return folder


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return guided_teacher(steps=3, num_frames=FRAMES)


@pytest.fixture(scope="module")
def student(teacher: VideoModel) -> VideoModel:
    contract = Contract(sampler=Renoise(), steps=2, grid=Exact(grids=((1.0, 0.0), (1.0, 0.5, 0.0))))
    return VideoModel(replace(teacher.card, name="tiny student", role="student", contract=contract), teacher.parts)


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_the_centre_is_cropped_to_the_pixel():
    columns = torch.arange(10.0).expand(1, 1, 4, 10)
    assert cover(columns, (4, 4))[0, 0, 0].tolist() == [3, 4, 5, 6]
    assert cover(columns.mT, (4, 4))[0, 0, :, 0].tolist() == [3, 4, 5, 6]
    assert cover(columns, (4, 5))[0, 0, 0].tolist() == [2, 3, 4, 5, 6]  # an odd rest is cut at the right
    assert torch.equal(cover(columns, (4, 10)), columns)


@pytest.mark.parametrize(("height", "width"), [(30, 53), (53, 30), (9, 16)])
def test_the_shorter_side_is_scaled_as_pillow_does(height: int, width: int):
    values = np.random.default_rng(0).random((height, width), dtype=np.float32)
    covered = (round(width * 20 / min(height, width)), round(height * 20 / min(height, width)))
    left, top = (covered[0] - 20) // 2, (covered[1] - 20) // 2
    wanted = Image.fromarray(values).resize(covered, Image.Resampling.BICUBIC).crop((left, top, left + 20, top + 20))
    mine = cover(torch.from_numpy(values)[None, None], (20, 20))
    np.testing.assert_allclose(mine[0, 0].numpy(), np.asarray(wanted), atol=2e-5)


def test_frames_are_taken_evenly_and_what_fits_is_not_touched():
    clips = torch.arange(33.0).reshape(1, 1, 33, 1, 1).expand(2, 3, 33, 6, 6) / 33
    read = as_read(clips, (6, 6), 16)
    assert (33 * read[0, 0, :, 0, 0]).round().tolist() == [0, 2, 4, 6, 9, 11, 13, 15, 17, 19, 21, 23, 26, 28, 30, 32]
    assert as_read(clips, (6, 6), 33) is clips and as_read(clips, (6, 6)) is clips
    with pytest.raises(ValueError, match="reads 64 frames, and the clips have 33"):
        as_read(clips, (6, 6), 64)


def test_every_clip_and_frame_is_resized_alone_and_stays_in_range():
    clips = (torch.rand(2, 3, 3, 8, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 2 - 1
    read = as_read(clips, (20, 20))
    assert read.shape == (2, 3, 3, 20, 20) and read.abs().max() == 1  # bicubic overshoot is clipped
    torch.testing.assert_close(read[1, :, 2], cover(clips[1, :, 2][None], (20, 20))[0].clamp(-1, 1))


# --- extractors -------------------------------------------------------------------------------------------------------


def test_i3d_is_called_for_features_of_pixels_between_minus_one_and_one(i3d: Path):
    extractor = feature_map(str(i3d), (SIDE, SIDE), CPU)
    extractor.check(FRAMES, (SIDE, SIDE), CPU)
    clips = torch.rand(3, 3, FRAMES, 40, 60) * 2 - 1
    told = {"rescale": False, "resize": False, "return_features": True}
    torch.testing.assert_close(extractor.map(clips), I3D()(as_read(clips, (224, 224)), **told))
    for said in ("i3d_torchscript.pt", "16 frames of 224x224", "return_features=True", "rescale=False"):
        assert said in extractor.name
    with pytest.raises(ValueError, match="reads 16 frames, and the clips have 8"):
        extractor.check(8, (SIDE, SIDE), CPU)


def test_another_torchscript_file_is_called_with_pixels_only(tmp_path: Path, i3d: Path):
    extractor = feature_map(str(scripted(Plain(), tmp_path / "plain.pt")), (SIDE, SIDE), CPU)
    assert extractor.map(torch.ones(2, 3, 20, 8, 8)).tolist() == [[1, 1, 1]] * 2
    assert "rescale" not in extractor.name
    assert (
        extractor.name.split()[1] != feature_map(str(i3d), (SIDE, SIDE), CPU).name.split()[1]
    )  # of the file's content


def test_what_is_no_extractor_is_refused_before_anything_is_sampled(tmp_path: Path, teacher: VideoModel):
    with pytest.raises(ValueError, match=r"gives \[2, 3, 224, 224\] for two clips"):
        feature_map(str(scripted(Unpooled(), tmp_path / "x.pt")), (SIDE, SIDE), CPU).check(FRAMES, (SIDE, SIDE), CPU)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        feature_map(str(tmp_path / "weights.pt"), (SIDE, SIDE), CPU)
    with pytest.raises(FileNotFoundError, match="no such file"):
        feature_map(str(tmp_path / "i3d.pt"), (SIDE, SIDE), CPU)
    with pytest.raises(FileNotFoundError, match=r"no card\.json"):
        feature_map(str(tmp_path), (SIDE, SIDE), CPU)


def test_our_own_features_see_clips_at_the_size_they_were_made_for(tmp_path: Path):
    network = ClipFeatures(width=8).eval()
    VideoModel(Card(name="eye", height=16, width=24), {"features": network}).save(tmp_path)
    clips = torch.rand(2, 3, 4, 40, 40) * 2 - 1
    with torch.no_grad():
        got = feature_map(str(tmp_path), (40, 40), CPU).map(clips)
        torch.testing.assert_close(got, network(as_read(clips, (16, 24))))


@pytest.mark.parametrize("family", ["VideoMAE", "Timesformer"])
def test_a_video_encoder_sees_what_its_own_processor_would_make(family: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(image_size=32, patch_size=16, num_frames=4, **sizes)
    network = getattr(transformers, f"{family}Model")(config).eval()
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image processor"):
        feature_map(str(tmp_path), (SIDE, SIDE), CPU)
    processor = transformers.VideoMAEImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    extractor = feature_map(str(tmp_path), (SIDE, SIDE), CPU)
    with torch.no_grad():
        wanted = [network(**processor(list(clip.numpy()), return_tensors="pt")).last_hidden_state for clip in pixels]
        torch.testing.assert_close(extractor.map(to_floats(pixels)), torch.cat(wanted).mean(1), rtol=1e-4, atol=1e-5)
    assert f"{family}Model" in extractor.name and "4 frames of 32x32" in extractor.name
    transformers.VideoMAEImageProcessor(rescale_factor=1 / 127.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not scale pixels to \[0, 1\]"):
        feature_map(str(tmp_path), (SIDE, SIDE), CPU)


def test_an_image_encoder_is_no_video_encoder(clip: Path):
    with pytest.raises(ValueError, match="is not a video encoder; give a folder with one"):
        feature_map(str(clip), (SIDE, SIDE), CPU)


# --- CLIPScore --------------------------------------------------------------------------------------------------------


def test_clip_score_is_what_transformers_computes(clip: Path):
    from transformers import CLIPModel, CLIPProcessor

    from fewstep.evaluate.features.clip_score import ClipScore

    prompts = ("a red ball", "two grey boxes, slowly")
    clips = torch.rand(4, 3, 3, 30, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1
    score = ClipScore(clip, Cases(prompts, None, 2, 0), CPU)
    network, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    wanted = []
    for i, one in enumerate(clips):
        inputs = processor(text=[prompts[i // 2]], images=list(to_pixels(one).numpy()), return_tensors="pt")
        with torch.no_grad():
            wanted.append(100 * network(**inputs).logits_per_image.mean() / network.logit_scale.exp())
    torch.testing.assert_close(score(clips, 0, 2)["clip_score"], torch.stack(wanted), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(score(clips[2:], 1, 2)["clip_score"], torch.stack(wanted[2:]), rtol=1e-5, atol=1e-4)
    assert score.cut == 0 and ClipScore(clip, Cases(("word " * 40, "short"), None, 1, 0), CPU).cut == 1
    with pytest.raises(FileNotFoundError, match="CLIPModel and CLIPProcessor"):
        ClipScore(clip / "nowhere", Cases(prompts, None, 1, 0), CPU)


def test_finished_videos_get_the_same_clip_score(clip: Path, tmp_path: Path):
    from fewstep.data.video import read_video
    from fewstep.evaluate.features.clip_score import Clip, ClipScore
    from fewstep.evaluate.finished import Options, compare_videos
    from fewstep.metrics.vlite import consistency
    from support_finished import films, vivid

    sides = [films(tmp_path / "old", count=2), films(tmp_path / "new", vivid, count=2)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\ntwo grey boxes, slowly\n")
    made = compare_videos(sides, tmp_path / "out", Options(clip=str(clip), prompt_file=prompts, num_frames=4))
    first = to_floats(read_video(sides[1] / "film-2.mp4", 4))[None]
    figures = made.videos[1].sides[1].figures
    score = ClipScore(clip, Cases(("two grey boxes, slowly",), None, 1, 0), CPU)(first, 0, 1)["clip_score"]
    assert figures["clip_score"] == pytest.approx(float(score), rel=1e-5)
    alike = consistency(Clip(clip, CPU).frames(first[0])[None])
    assert figures["vlite.background_consistency"] == pytest.approx(float(alike), rel=1e-5)
    assert made.controls["a still picture"]["vlite.background_consistency"] == pytest.approx(1)
    unasked = compare_videos(sides, tmp_path / "b", Options(clip=str(clip), num_frames=4))
    assert unasked.videos[0].sides[0].figures["clip_score"] is None
    assert any(note.startswith("CLIPScore: not measured") for note in unasked.notes)


# --- real clips -------------------------------------------------------------------------------------------------------


def test_real_clips_are_drawn_by_seed_without_the_unreadable(videos: Path):
    real = RealClips(path=str(videos), stride=2)
    drawn = real.draw(6, FRAMES, (SIDE, SIDE), 0)
    assert drawn.sets == 2 and drawn.captions == real.draw(6, FRAMES, (SIDE, SIDE), 0).captions
    assert drawn.captions != real.draw(6, FRAMES, (SIDE, SIDE), 1).captions
    assert not any("must not" in caption for caption in drawn.captions)
    first, second = (torch.cat(list(drawn.draw(which, [(0, 4), (4, 6)]))) for which in range(2))
    assert first.shape == second.shape == (6, 3, FRAMES, SIDE, SIDE)
    assert not (first.flatten(1)[:, None] == second.flatten(1)[None]).all(2).any()  # no clip is in both
    assert real.draw(9, FRAMES, (SIDE, SIDE), 0).sets == 1
    with pytest.raises(DataError, match="14 videos have 16 frames at stride 2, and 20 are needed"):
        real.draw(20, FRAMES, (SIDE, SIDE), 0)
    with pytest.raises(DataError, match="too short"):
        RealClips(path=str(videos), stride=4).draw(4, FRAMES, (SIDE, SIDE), 0)


def test_real_clips_lie_as_datasets_do(videos: Path, tmp_path: Path):
    for number, path in enumerate(sorted(videos.glob("*.mp4"))):
        folder = tmp_path / "UCF" / ("YoYo" if number % 2 else "PlayingCello")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    drawn = RealClips(path=str(tmp_path / "UCF"), stride=2, layout="ucf101").draw(6, FRAMES, (SIDE, SIDE), 0)
    assert set(drawn.captions) == {"yo yo", "playing cello"}


def test_prompts_are_captions_unless_given(videos: Path):
    suite = Suite.avdm2(real=RealClips(path=str(videos), stride=1), features="x", clip="y", prompts=5)
    cases, truth = ask(suite, FRAMES, (SIDE, SIDE))
    assert truth is not None and truth.judged == 0
    assert len(cases.prompts) == 5 and set(cases.prompts) <= {p.read_text() for p in videos.glob("*.txt")}
    cases, truth = ask(replace(suite, texts=("a cat",) * 4), FRAMES, (SIDE, SIDE))
    assert cases.prompts == ("a cat",) * 4
    assert truth is not None and truth.judged is None and truth.name.startswith("4 real clips")
    with pytest.raises(ValueError, match="seeds_per_prompt must be 1"):
        replace(suite, seeds_per_prompt=2)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protocol(videos: Path, i3d: Path, clip: Path) -> Suite:
    real = RealClips(path=str(videos), stride=1)
    return Suite.avdm2(real=real, features=str(i3d), clip=str(clip), prompts=5, latency_runs=3, latency_budget=0.1)


@pytest.fixture(scope="module")
def finished(
    teacher: VideoModel, student: VideoModel, protocol: Suite, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("protocol")
    rows = [
        Entry(name="teacher 3", model=teacher),
        Entry(name="teacher 1", model=teacher, steps=1),
        Entry(name="student 1", model=student, steps=1),
    ]
    return evaluate(rows, protocol, folder), folder


def test_every_figure_has_its_interval_and_its_n(finished: tuple[Report, Path]):
    report, folder = finished
    assert load_report(folder) == report
    for row in report.rows:
        assert row.frechet is not None and row.frechet_ci is not None and row.clip_score_ci is not None
        assert row.frechet_ci[0] < row.frechet < row.frechet_ci[1]
        assert row.clip_score_ci[0] <= (row.clip_score or 0) <= row.clip_score_ci[1]
        assert row.frechet_n == 5 and row.diversity is None
        assert row.frechet > report.frechet_floor  # random networks do not make real clips
    gain, baseline, last = report.row("student 1").gain, report.row("teacher 1"), report.row("student 1")
    assert gain is not None and gain.baseline == "teacher 1" and gain.frechet_ci is not None
    assert gain.frechet == pytest.approx(last.frechet - baseline.frechet)
    assert gain.clip_score == pytest.approx(last.clip_score - baseline.clip_score, abs=1e-4)


def test_real_clips_are_measured_like_a_row(finished: tuple[Report, Path]):
    truth = finished[0].truth
    assert truth is not None and truth.name == "real clips" and truth.frechet == finished[0].frechet_floor
    assert truth.accuracy is not None and truth.accuracy > 0.5  # they survive the file, the scaling and the crop
    assert truth.clip_score is not None


def test_features_and_n_are_said_wherever_a_figure_is(finished: tuple[Report, Path]):
    report, folder = finished
    heads = [str(column.header) for column in table(report).columns]
    assert "FVD" in heads and "CLIPScore" in heads and "Frechet" not in heads
    said = str(table(report).caption)
    assert "FVD: n = 5, to 5 real clips" in said and "i3d_torchscript.pt" in said
    assert "CLIPScore: n = 5" in said and "FVD: 5 clips are few for 9 features" in said
    page = write_report(folder).read_text()
    for words in ("the captions of 5 real clips", "1 seed each", "real clips</td>", "CLIPScore", "FVD controls"):
        assert words in page


def test_the_distance_is_what_one_computes_by_hand(
    finished: tuple[Report, Path], teacher: VideoModel, protocol: Suite, i3d: Path
):
    cases, truth = ask(protocol, FRAMES, (SIDE, SIDE))
    assert truth is not None
    made = teacher(cases.prompts, seed=[cases.seeds(i)[0] for i in range(5)])
    real = torch.cat(list(truth.draw(0, [(0, 5)])))
    extract = feature_map(str(i3d), (SIDE, SIDE), CPU).map
    assert finished[0].row("teacher 3").frechet == pytest.approx(frechet(extract(made), extract(real)), rel=1e-4)


def test_enough_clips_for_their_features_are_extrapolated(teacher: VideoModel, videos: Path, tmp_path: Path):
    plain = scripted(Plain(), tmp_path / "plain.pt")
    real = RealClips(path=str(videos), stride=1)
    suite = Suite(real=real, features=str(plain), prompts=6, seeds_per_prompt=1, latency_runs=3, latency_budget=0.1)
    report = evaluate([Entry(name="teacher 1", model=teacher, steps=1)], suite, tmp_path)
    row, names = report.rows[0], [str(column.header) for column in details(report).columns]
    assert row.frechet_infinity is not None and row.frechet is not None and row.frechet_infinity < row.frechet
    assert "FVD, n to infinity" in names
    assert row.clip_score is None and "CLIPScore" not in str(table(report).caption)
    assert not any("are few for" in note for note in report.notes)


def test_on_the_command_line(
    teacher: VideoModel, student: VideoModel, videos: Path, i3d: Path, clip: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    teacher.save(tmp_path / "teacher")
    student.save(tmp_path / "student")
    (tmp_path / "prompts.txt").write_text("a red ball\na cat\na dog\nrain\n")
    words = [
        "evaluate",
        tmp_path / "student",
        "--teacher",
        tmp_path / "teacher",
        "--output",
        tmp_path / "report",
        "--quiet",
    ]
    protocol = ["--suite", "avdm2", "--real", videos, "--stride", 1, "--features", i3d, "--clip", clip]

    def run(*more: object) -> tuple[int, str, str]:
        code = main([str(word) for word in (*words, *more)])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    code, _, err = run(*protocol)
    assert code == 2 and "and 100 are needed" in err and "ask for fewer prompts" in err
    code, _, err = run("--suite", "avdm2", "--real", videos)
    assert code == 2 and "--features" in err and "--clip" in err
    code, _, err = run("--real", videos)
    assert code == 2 and "--suite avdm2" in err
    code, out, err = run(*protocol, "--prompt-file", tmp_path / "prompts.txt", "--num-inference-steps", 1)
    assert code == 0, err
    for name in ("teacher 3", "teacher 1", "student 1", "real clips", "FVD", "CLIPScore"):
        assert name in out
    assert "without training: CLIPScore" in (tmp_path / "report" / "report.html").read_text()
    report = load_report(tmp_path / "report")
    assert report.rows[0].frechet_n == 4 and report.truth is not None and report.truth.clip_score is None
