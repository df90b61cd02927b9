"""`fewstep sample`: which clips, in which files, and that a file says how to make them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.cli.clips import Wanted, _spans
from fewstep.cli.generation import Sample
from fewstep.data.video import FORMATS, read_note, read_video, write_video
from fewstep.diffusion import CFG, Contract
from fewstep.models import VideoModel
from fewstep.models.bundle import read_card
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a small red ring", "a large blue disc")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VideoModel:
    monkeypatch.chdir(tmp_path)
    made = tiny_model().with_card(contract=Contract(steps=2, guidance=CFG(scale=3.0)))
    made.save("tiny")
    return VideoModel.from_pretrained("tiny")


def sampled(*words: Any) -> None:
    assert main(["sample", *map(str, words), "--quiet"]) == 0


def pictures(path: str) -> np.ndarray:
    frames = []
    with Image.open(path) as file:
        for number in range(getattr(file, "n_frames", 1)):
            file.seek(number)
            frames.append(np.asarray(file.convert("RGB")))
    return np.stack(frames)


def test_several_seeds_are_a_grid_with_a_row_per_prompt(model: VideoModel) -> None:
    sampled("tiny", "--prompt", *PROMPTS, "--seed", 3, 7, 9, "--scale", 1, "--output", "grid.webp")
    grid = pictures("grid.webp")
    assert grid.shape[1:] == (2 * model.card.height, 3 * model.card.width, 3)
    for row, prompt in enumerate(PROMPTS):
        for column, seed in enumerate((3, 7, 9)):
            sampled("tiny", "--prompt", prompt, "--seed", seed, "--scale", 1, "--output", "one.webp")
            height, width = model.card.height, model.card.width
            cell = grid[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert np.abs(cell.astype(int) - pictures("one.webp")).max() <= 1


def test_one_seed_counts_up() -> None:
    assert Wanted.of(Sample(prompt=PROMPTS, seed=(5,))) == Wanted(PROMPTS, (5, 6))
    both = Wanted.of(Sample(prompt=PROMPTS, seed=(5, 2)))
    assert both == Wanted((PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]), (5, 2, 5, 2))


def test_many_clips_have_a_file_each() -> None:
    card = read_card("world")
    assert _spans(8, 0, card, 1) == [(0, 8)] and len(_spans(9, 0, card, 1)) == 9
    assert _spans(64, 8, card, 1) == [(0, 64)] and len(_spans(72, 8, card, 1)) == 72
    assert len(_spans(8, 0, card, 16384 // card.width)) == 8


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_says_how_to_make_it_again(suffix: str, model: VideoModel) -> None:
    first, again, other = (f"{name}{suffix}" for name in ("first", "again", "other"))
    sampled("tiny", "--prompt", *PROMPTS, "--seed", 4, "--guidance-scale", 2, "--output", first)
    sampled("--like", first if suffix != ".png" else "first", "--output", again)
    sampled("--like", first if suffix != ".png" else "first", "--seed", 5, "--output", other)
    made, same, different = (contents(path) for path in (first, again, other))
    assert made == same != different
    told = json.loads(read_note(first if suffix != ".png" else "first"))
    assert told["prompts"] == list(PROMPTS) and told["seeds"] == [4, 5] and told["times"] == [1.0, 0.5, 0.0]
    assert told["options"]["guidance_scale"] == 2.0 and told["denoiser"] == model.fingerprint("denoiser")


def contents(path: str) -> list[bytes]:
    folder = Path(path).with_suffix("")
    return [file.read_bytes() for file in sorted(folder.glob("*.png"))] or [Path(path).read_bytes()]


def test_a_grid_is_made_again_as_a_grid(model: VideoModel) -> None:
    sampled("tiny", "--prompt", *PROMPTS, "--seed", 9, 2, "--output", "grid.gif")
    sampled("--like", "grid.gif", "--output", "again.gif")
    assert Path("grid.gif").read_bytes() == Path("again.gif").read_bytes()


def test_other_weights_are_announced(model: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    sampled("tiny", "--prompt", PROMPTS[0], "--output", "first.gif")
    sampled("--like", "first.gif", "--output", "again.gif")
    assert "other weights" not in capsys.readouterr().err
    tiny_model(seed=1).save("tiny")
    sampled("--like", "first.gif", "--output", "again.gif")
    assert "first.gif was made by other weights" in capsys.readouterr().err


def test_another_size_and_rate(model: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--height", 2 * model.card.height, "--width", model.card.width, "--scale", 1)
    sampled("tiny", "--prompt", PROMPTS[0], *size, "--fps", 4, "--output", "tall.webp")
    assert pictures("tall.webp").shape[1:] == (2 * model.card.height, model.card.width, 3)
    with Image.open("tall.webp") as file:
        file.load()
        assert file.info["duration"] == 250
    model.with_card(role="student", contract=Contract(steps=2)).save("student")
    words = ["sample", "student", "--prompt", PROMPTS[0], *map(str, size), "--output", "x.gif"]
    assert main(words) == 2 and "leave --height and --width out, or add --force" in capsys.readouterr().err
    assert main([*words, "--force", "--quiet"]) == 0


def test_a_negative_prompt_is_read_where_there_is_guidance(
    model: VideoModel, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = {}
    for name, words in {
        "own": (),
        "other": ("--negative-prompt", "a blue box"),
        "empty": ("--negative-prompt", ""),
    }.items():
        sampled("tiny", "--prompt", PROMPTS[0], *words, "--output", f"{name}.webp")
        clips[name] = pictures(f"{name}.webp")
    assert np.array_equal(clips["own"], clips["empty"]) and not np.array_equal(clips["own"], clips["other"])
    model.with_card(role="student", contract=Contract(steps=2)).save("student")
    assert main(["sample", "student", "--prompt", "a", "--negative-prompt", "b", "--output", "x.gif"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reads no negative prompt. Leave it out, or apply guidance on top (--guidance-scale 2 --force)" in said


def test_a_preview_is_the_middle_frame_after_each_step(model: VideoModel) -> None:
    sampled("tiny", "--prompt", *PROMPTS, "--scale", 1, "--preview", "now.png", "--output", "clip.webp")
    shown = pictures("now.png")
    assert shown.shape == (1, model.card.height, 2 * model.card.width, 3)
    steps = [step.prediction.x0 for step in model.sampling(PROMPTS)]
    middle = steps[-1].shape[2] // 2
    expected = write_video("expected.png", model.decode(steps[-1][:, :, middle : middle + 1]))
    assert np.array_equal(shown, pictures(str(expected)))


def test_notes_survive_in_every_format(tmp_path: Path) -> None:
    clip, note = torch.zeros(3, 3, 16, 16), json.dumps({"prompt": "é \n <ball> " + 400 * "x"})
    for suffix in FORMATS:
        path = write_video(tmp_path / f"clip{suffix}", clip, note=note)
        assert read_note(path) == note
        assert read_note(write_video(tmp_path / f"plain{suffix}", clip)) == ""
    assert read_video(tmp_path / "clip.mp4", num_frames=3).shape == (3, 16, 16, 3)


@pytest.mark.parametrize("wrong", ["plain.gif", "no.txt", "absent.mp4", "cut.mp4"])
def test_files_without_a_note_are_refused(wrong: str, model: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    write_video("plain.gif", torch.zeros(3, 2, 16, 16))
    Path("no.txt").write_text("x")
    Path("cut.mp4").write_bytes(b"abc")
    assert main(["sample", "--like", wrong, "--output", "x.gif"]) == 2
    assert wrong in capsys.readouterr().err


def test_a_model_or_a_file_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--prompt", "a"]) == 2
    assert "name a model, such as world, or a file to make again: --like FILE" in capsys.readouterr().err


def test_first_steps_of_a_teacher(model: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(seed=1).with_card(role="student", contract=Contract(steps=2)).save("student")
    words = ("student", "--prompt", PROMPTS[0])
    sampled(*words, "--output", "alone.webp")
    sampled(*words, "--teacher", "tiny", "--teacher-steps", 1, "--output", "led.webp")
    sampled("--like", "led.webp", "--output", "again.webp")
    assert contents("led.webp") == contents("again.webp") != contents("alone.webp")
    assert main(["sample", *words, "--teacher", "tiny"]) == 2
    assert "--teacher and --teacher-steps belong together" in capsys.readouterr().err


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny Wan as it is published: with UniPC."""
    diffusers = pytest.importorskip("diffusers")
    from tiny_models import save_tiny

    monkeypatch.chdir(tmp_path)
    folder = save_tiny("wan", tmp_path / "wan")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    (folder / "scheduler" / "scheduler_config.json").unlink()
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return "wan"


def test_a_preset_is_followed_named_and_made_again(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = (
        "--prompt",
        "a cat",
        "--num-frames",
        5,
        "--force",
        "--height",
        32,
        "--width",
        48,
        "--num-inference-steps",
        2,
    )
    sampled(layout, *small, "--preset", "layout", "--output", "first.gif")
    assert "preset layout: UniPCMultistepScheduler of the layout" in capsys.readouterr().err
    note = json.loads(read_note(Path("first.gif")))
    assert note["options"]["preset"] == "layout" and note["times"][0] == pytest.approx(1 - 1e-6, abs=1e-9)
    sampled("--like", "first.gif", "--output", "again.gif")
    assert np.array_equal(pictures("first.gif"), pictures("again.gif"))
    sampled(layout, *small, "--output", "plain.gif")
    assert not np.array_equal(pictures("first.gif"), pictures("plain.gif"))


def test_a_dry_run_plans_the_preset_s_size(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(layout, "transformer", "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 40}))
    for words, size in (((), "480 x 832"), (("--preset", "authors"), "720 x 1280")):
        assert main(["sample", layout, "--prompt", "a cat", "--num-frames", "5", "--force", "--dry-run", *words]) == 0
        assert size in capsys.readouterr().out
