"""Your own videos through the command line, with the shipped recipes at toy size: every step, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest

from fewstep.cli import main
from support_videos import Said, make_videos, run, sized

TEXT = "{type: TextEncoder, width: 16, depth: 1, heads: 2, buckets: 64}"
SIZE = (4, 32)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def answer(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return answer


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three good videos, one that is cut off in the middle, one that is no video, one too short, one that is absent."""
    monkeypatch.chdir(tmp_path)
    folder = make_videos(tmp_path / "videos", frames=16)
    whole = (folder / "red.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video")
    make_videos(tmp_path / "short", 1, frames=5)
    (tmp_path / "short" / "red.mp4").rename(folder / "short.mp4")
    with (folder / "captions.jsonl").open("a") as table:
        for name in ("torn", "text", "short", "absent"):
            table.write(json.dumps({"video": f"{name}.mp4", "caption": "whatever"}) + "\n")
    return folder


def train_autoencoder(videos: Path, output: str, *more: object) -> None:
    size = sized(*SIZE, "model", "data")
    run("train", "videos/autoencoder", "--data.path", videos, *size, "--model.codec.width", 8,
        "--model.codec.depth", 1, "--settings.steps", 2, "--settings.batch", 2, "--output", output, "--quiet", *more)  # fmt: skip


def teacher(output: str, *more: object) -> list[object]:
    return [
        "train", "videos/teacher", *sized(*SIZE, "model"), "--model.text", TEXT, "--data.path", "latents",
        "--model.denoiser.width", 24, "--model.denoiser.depth", 1, "--model.denoiser.text-width", 16,
        "--model.contract.steps", 4, "--model.codec", "autoencoder/codec", "--settings.steps", 2,
        "--settings.batch", 2, "--output", output, "--quiet", *more,
    ]  # fmt: skip


def test_from_video_files_to_a_measured_student(videos: Path, said: Said, single_thread: None) -> None:
    train_autoencoder(videos, "autoencoder")
    cut = ["--model", "autoencoder/codec", "--stride", 2, "--clips-per-video", 0, "--quiet"]
    code, out, err = said("prepare", videos, "--output", "latents", *cut)
    assert code == 0 and "clips of 4 frames of 32 x 32, every 2 frames of the file" in out, err
    assert "6 clips in 1 shards" in out and out.split()[-1] == "latents"
    for reason, count, example in (
        ("no such file", "1", "absent.mp4: no such file"),
        ("not a readable video", "2", "torn.mp4: not a readable video"),
        ("too short", "1", "short.mp4: too short: 3 of 4"),
    ):
        line = next(line for line in out.splitlines() if line.startswith(reason))
        assert line.removeprefix(reason).split()[0] == count and example in line, out
    assert said("prepare", videos, "--output", "latents", *cut)[1] == out  # finished: reported again, not made again
    code, _, err = said("prepare", videos, "--output", "latents", *cut[:-1], "--num-frames", 8)
    assert code == 2 and "cut.num_frames: there 4, here 8" in err

    code, out, err = said(*teacher("teacher"))
    assert code == 0 and out.strip() == "teacher/teacher", err
    small = [
        "--model.source",
        "teacher/teacher",
        "--data.path",
        "latents",
        "--settings.steps",
        2,
        "--settings.batch",
        2,
    ]
    small += ["--settings.log-every", 1]
    code, out, err = said("distill", "videos/dmd2", *small, "--output", "student", "--quiet")
    assert code == 0 and Path("student/previews/000002.png").is_file(), err
    code, _, err = said("sample", "student/student", "--prompt", "a red square", "a cow", "--output", "clip.mp4")
    assert code == 0, err
    with av.open("clip.mp4") as file:
        assert sum(1 for _ in file.decode(video=0)) == 4
        assert (file.streams.video[0].width, file.streams.video[0].height) == (2 * 4 * 32, 4 * 32)
    Path("prompts.txt").write_text("a red square\na cow\n")
    words = ["--teacher", "teacher/teacher", "--prompt-file", "prompts.txt", "--num-inference-steps", 2, "--quiet"]
    code, out, err = said("evaluate", "student/student", *words, "--output", "report")
    assert code == 0 and "student 2" in out, err
    page = Path("report/report.html").read_text()
    assert "a cow" in page and "critic_updates" in page and "loss/" in page  # clips, the recipe, the run's curves


def test_what_does_not_fit_is_refused_before_anything_is_loaded(videos: Path, said: Said, single_thread: None) -> None:
    train_autoencoder(videos, "autoencoder")
    train_autoencoder(videos, "other", "--settings.seed", 1)
    run("prepare", videos, "--output", "latents", "--model", "autoencoder/codec", "--quiet")
    Path("prompts.txt").write_text("a red square\n")
    Path("other/codec/codec.safetensors").unlink()  # so that loading it would be another error
    for more, words in {
        ("--model.codec", "other/codec"): "holds latents of autoencoder",
        ("--model.codec", "{type: FrameAutoencoder}"): "but model 'videos-teacher' has made new",
        (
            "--model.height",
            "64",
        ): "holds clips of 4 frames of 32 x 32, but model 'videos-teacher' makes 4 frames of 64 x 32",
        ("--data.type", "Prompts", "--data.path", "prompts.txt"): "FlowMatching needs x0; Prompts provides prompts",
        ("--data.type", "Videos", "--data.path", str(videos)): "data.num_frames, height, width are (16, 64, 64)",
        ("--data.path", "nowhere"): "nowhere has no manifest.json",
    }.items():
        code, _, err = said(*teacher("refused", *more))
        assert code == 2 and words in err, (more, err)
        assert not Path("refused").exists()
    code, _, err = said("train", "videos/autoencoder", "--data.path", "nowhere", "--output", "refused")
    assert code == 2 and "nowhere: no such file or folder" in err and not Path("refused").exists()
    code, _, err = said(
        "train", "videos/autoencoder", "--data.path", videos, "--data.height", 32, "--output", "refused"
    )
    assert code == 2 and "data.num_frames, height, width are (16, 32, 64)" in err and not Path("refused").exists()


def test_a_csv_table_is_a_list_of_videos_too(videos: Path, said: Said, single_thread: None) -> None:
    train_autoencoder(videos, "autoencoder")
    table = videos / "chosen.csv"
    table.write_text('video,caption\nred.mp4,"a square, red"\nblue.mp4,a blue one\n')
    code, out, err = said("prepare", table, "--output", "chosen", "--model", "autoencoder/codec", "--quiet")
    assert code == 0 and "2 clips in 1 shards" in out, err
    rows = [json.loads(line) for line in Path("chosen/index.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a square, red", "a blue one"]
