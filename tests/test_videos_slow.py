"""Your own videos, for long enough to learn something: real clips where they are at hand, otherwise three made here."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import av
import pytest
import torch

from fewstep.core import Rng
from fewstep.data import Latents, Videos
from fewstep.engine.log import read_metrics
from fewstep.evaluate.results import load_report
from fewstep.metrics import psnr
from fewstep.models import VideoModel
from support_videos import CLIPS, make_videos, run, sized

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FRAMES, SIZE = 8, 32
PRECISE = ("--settings.autocast", "off")
"""The same numbers where the processor has bfloat16 and where it has not; there bfloat16 takes ten times as long."""


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return CLIPS if CLIPS.is_dir() else make_videos(tmp_path / "videos", frames=48, waves=True)


def test_autoencoder_teacher_student_film(videos: Path, single_thread: None) -> None:
    cut = ["--data.stride", 2, "--data.clips-per-video", 0]
    run("train", "videos/autoencoder", "--data.path", videos, *sized(FRAMES, SIZE, "model", "data"), *cut,
        "--model.codec.width", 16, "--settings.steps", 400, "--settings.ema", 0.95,
        "--settings.optim.student.lr", 0.004, *PRECISE, "--output", "autoencoder", "--quiet")  # fmt: skip
    run("prepare", videos, "--model", "autoencoder/codec", "--output", "latents", "--stride", 2,
        "--clips-per-video", 0, "--quiet")  # fmt: skip
    run("train", "videos/teacher", *sized(FRAMES, SIZE, "model"), "--data.path", "latents",
        "--model.text", "{type: TextEncoder, width: 64, depth: 1}", "--model.denoiser.text-width", 64,
        "--model.denoiser.width", 64, "--model.denoiser.depth", 3, "--model.codec", "autoencoder/codec",
        "--settings.steps", 400, *PRECISE, "--output", "teacher", "--quiet")  # fmt: skip
    run("distill", "videos/dmd2", "--model.source", "teacher/teacher", "--data.path", "latents",
        "--settings.steps", 60, *PRECISE, "--output", "run", "--quiet")  # fmt: skip

    teacher, student = VideoModel.from_pretrained("teacher/teacher"), VideoModel.from_pretrained("run/student")
    assert reconstruction(videos, student) > 20
    latents = Latents(path="latents").open(student, frozenset({"x0"})).batch(16, Rng(0)).x0
    assert latents is not None and 0.7 < float(latents.std()) < 1.3  # normalised by what the autoencoder saw
    losses = [row["loss/flow"] for row in read_metrics(Path("teacher/metrics.jsonl"))]
    assert fmean(losses[-5:]) < 0.8 * fmean(losses[:2]), losses
    assert student.card.contract.counts == (1, 2, 4) and student.card.role == "student"
    assert student.card.provenance["teacher"].startswith(teacher.card.name)

    source = Videos(path=str(videos), num_frames=FRAMES, height=SIZE, width=SIZE).open(student, frozenset({"prompts"}))
    prompts = sorted(set(source.batch(8, Rng(0)).prompts))
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    run("sample", "run/student", "--prompt-file", "prompts.txt", "--num-inference-steps", 2, "--output", "clips.mp4")
    with av.open("clips.mp4") as file:
        assert sum(1 for _ in file.decode(video=0)) == FRAMES
    run("evaluate", "run/student", "--teacher", "teacher/teacher", "--prompt-file", "prompts.txt",
        "--seeds", 8, "--output", "report", "--quiet")  # fmt: skip
    report = load_report("report")
    assert {row.nfe for row in report.rows if row.role == "student"} == {1, 2, 4}
    four = report.row("student 4")
    assert four.motion is not None and 0.7 < four.motion < 1.3, four
    assert four.diversity is not None and four.diversity > 0.6, four
    full, blurred = (teacher.latents(prompts, num_inference_steps=steps) for steps in (None, 1))
    one = student.latents(
        prompts, num_inference_steps=1
    )  # in more steps a hasty teacher, with nearly straight paths, is as good
    assert float((one - full).square().mean()) < 0.8 * float((blurred - full).square().mean())


@torch.no_grad()
def reconstruction(videos: Path, model: VideoModel) -> float:
    """PSNR of the reconstruction, in dB."""
    data = Videos(path=str(videos), num_frames=FRAMES, height=SIZE, width=SIZE, stride=2, clips_per_video=0)
    frames = data.open(model, frozenset({"frames"})).batch(8, Rng(0)).frames
    assert frames is not None
    return float(psnr(model.codec.decode(model.codec.encode(frames)).clamp(-1, 1), frames).mean())
