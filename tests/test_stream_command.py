"""`fewstep stream`: a video that is written while it is made, playable at any moment, and says how it was made."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.attention import BlockCausal, Dense
from fewstep.cli import main
from fewstep.core.pixels import to_uint8
from fewstep.data.growing import GrowingVideo
from fewstep.data.video import decode, read_note, read_rate, read_video, to_floats
from fewstep.diffusion import CFG, Contract, Exact, Renoise, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.bundle import read_card
from fewstep.models.needs import remembered
from fewstep.models.repattern import repattern
from fewstep.models.runtime import Runtime
from fewstep.streaming import Video, cascaded
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
SIDE, RATE = 32, 8


def colours(frames: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """Frames of one grey each, which differ."""
    return (torch.arange(frames) * 20 % 250).to(torch.uint8)[:, None, None, None].expand(-1, *size, 3).contiguous()


def test_a_video_that_grows_can_be_played_before_it_is_closed(tmp_path: Path) -> None:
    path, frames = tmp_path / "new" / "a.mp4", colours(12)
    with GrowingVideo(path, fps=8, scale=2, note="how") as video:
        for begin in range(0, 12, 4):
            video.add(frames[begin : begin + 4])
            copy = tmp_path / "copy.mp4"
            copy.write_bytes(path.read_bytes())  # as a kill would leave it
            there = read_video(copy, begin + 3)  # all but the last frame
            assert (there[:, 8, 8].int() - frames[: begin + 3, 8, 8].int()).abs().max() <= 3
            assert read_note(copy) == "how" and read_rate(copy) == 8
    assert video.frames == 12 and read_video(path, 12).shape == (12, 32, 32, 3)


def test_odd_sizes_and_others(tmp_path: Path) -> None:
    with GrowingVideo(tmp_path / "a.mp4", fps=12.5) as video:
        video.add(colours(2, (15, 17)))
        with pytest.raises(ValueError, match="frames of 16 x 18 are in the file, and 16 x 16"):
            video.add(colours(1))
    assert read_video(tmp_path / "a.mp4", 2).shape == (2, 16, 18, 3) and read_rate(tmp_path / "a.mp4") == 12.5
    with pytest.raises(ValueError, match=r"an \.mp4"):
        GrowingVideo(tmp_path / "a.gif", fps=8)
    with pytest.raises(ValueError, match="fps=0"):
        GrowingVideo(tmp_path / "b.mp4", fps=0)


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VideoModel:
    """A student in the folder `student`, in chunks of 3 frames, 8 frames per second."""
    monkeypatch.chdir(tmp_path)
    model, stream = tiny_model(), Stream(chunks=(3,), window=9, sink=3)
    grid = Exact(grids=((1.0, 0.5, 0.0),), otherwise=Shifted())
    contract = Contract(sampler=Renoise(), steps=2, grid=grid, stream=stream)
    network = repattern(model.denoiser, BlockCausal(chunk=3, window=9, sink=3))
    model.with_part("denoiser", network, contract=contract, role="student", fps=RATE).save("student")
    return VideoModel.from_pretrained("student")


def streamed(*words: Any) -> int:
    return main(["stream", "student", *map(str, words), "--quiet"])


def test_the_file_has_the_frames_of_the_stream(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt", "a red ball", "--at", 1.0, "a blue star", "--seed", 3, "--seconds", 2, "--scale", 2)
    assert streamed(*words, "--output", "x/a.mp4", "--preview", "now.png") == 0
    live = student.stream(["a red ball"], seed=3)
    assert live.prompt("a blue star", at=1.0) == 3
    expected = torch.cat([chunk.frames[0] for chunk in live.frames(6)])[:16]
    there = read_video("x/a.mp4", 16)
    assert there.shape[1:3] == (2 * student.card.height, 2 * student.card.width)
    small = there[:, ::2, ::2].float()
    assert (small.mean((1, 2)) - expected.float().mean((1, 2))).abs().max() < 6
    with pytest.raises(ValueError, match="too short: 16 of 17"):
        read_video("x/a.mp4", 17)
    note = json.loads(read_note("x/a.mp4"))
    assert note["prompts"] == ["a red ball"] and note["seeds"] == [3] and note["times"] == [1.0, 0.5, 0.0]
    assert note["changes"] == [{"at": 1.0, "chunk": 3, "prompt": "a blue star"}]
    assert note["denoiser"] == student.fingerprint("denoiser") and note["options"] == {
        "student": "student",
        "seconds": 2.0,
        "scale": 2,
    }
    assert Path("now.png").is_file()
    told = capsys.readouterr()
    assert told.out == "x/a.mp4\n"
    for word in ("16 frames,", "frames per second", "first frame after", "denoise", "commit", "decode", "MiB"):
        assert word in told.err
    assert main(["sample", "--like", "x/a.mp4"]) == 2 and "fewstep sample wrote" in capsys.readouterr().err


def test_the_same_words_make_the_same_video(student: VideoModel) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert (
            streamed("--prompt", "a red ball", "--at", 0.4, "a", "--at", 1, "b", "--seconds", 2, "--output", name) == 0
        )
    a, b = (read_video(name, 16) for name in ("a.mp4", "b.mp4"))
    assert torch.equal(a, b)


def test_a_video_is_made_again_from_what_it_says(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt", "a red ball", "--at", 1, "b", "--seconds", 2, "--seed", 4, "--switch", "recache", "--scale", 3)
    assert streamed(*words, "--output", "a.mp4") == 0
    assert main(["stream", "--like", "a.mp4", "--output", "b.mp4", "--quiet"]) == 0
    assert torch.equal(read_video("a.mp4", 16), read_video("b.mp4", 16))
    assert main(["stream", "--like", "a.mp4", "--seed", "5", "--output", "c.mp4", "--quiet"]) == 0
    assert not torch.equal(read_video("a.mp4", 16), read_video("c.mp4", 16))
    capsys.readouterr()
    with GrowingVideo(Path("d.mp4"), fps=8) as video:
        video.add(colours(2))
    assert main(["stream", "--like", "d.mp4"]) == 2 and "a file that fewstep stream wrote" in capsys.readouterr().err


def test_a_stream_goes_on_after_its_snapshot(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Both parts are the frames of one stream."""
    whole = ("--prompt", "a red ball", "--seed", 3, "--at", 3, "b")
    assert streamed(*whole, "--seconds", 4.5, "--output", "whole.mp4") == 0
    assert (
        streamed("--prompt", "a red ball", "--seed", 3, "--seconds", 1.5, "--snapshot", "s", "--output", "a.mp4") == 0
    )
    words = ("--restore", "s", "--seconds", 3)
    assert streamed(*words, "--at", 1.5, "b", "--output", "b.mp4") == 0
    note = json.loads(read_note("b.mp4"))
    assert note["after chunks"] == 4 and note["changes"] == [{"at": 1.5, "chunk": 8, "prompt": "b"}]
    parts = [read_video(name, count).float().mean((1, 2)) for name, count in (("a.mp4", 12), ("b.mp4", 24))]
    assert (torch.cat(parts) - read_video("whole.mp4", 36).float().mean((1, 2))).abs().max() < 6
    assert main(["stream", "--like", "b.mp4"]) == 2 and "went on after a snapshot" in capsys.readouterr().err
    assert streamed(*words, "--seed", 1) == 2 and "leave --video, --seed" in capsys.readouterr().err
    assert streamed("--seconds", 1) == 2 and "--prompt is missing" in capsys.readouterr().err
    assert streamed("--prompt", "a", "--seconds", 1, "--snapshot", "t") == 2
    assert "give --seconds 0.75 or 1.125" in capsys.readouterr().err and not Path("t").exists()


def test_ctrl_c_ends_the_video(
    student: VideoModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GrowingVideo.add

    def interrupted(video: GrowingVideo, pixels: torch.Tensor) -> None:
        if video.frames == 6:
            raise KeyboardInterrupt
        add(video, pixels)

    monkeypatch.setattr(GrowingVideo, "add", interrupted)
    assert streamed("--prompt", "a red ball", "--seconds", 4, "--output", "a.mp4") == 130
    assert "stopped; a.mp4 can be played and has 6 frames (0.75 s)" in capsys.readouterr().err
    assert len(read_video("a.mp4", 6)) == 6


@pytest.fixture
def refused(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: Any) -> str:
        assert streamed("--prompt", "a", *words, "--output", "a.mp4") == 2
        assert not Path("a.mp4").exists()
        return capsys.readouterr().err

    return run


def test_what_cannot_be_is_refused_before_anything_is_written(refused: Callable[..., str], student: VideoModel) -> None:
    assert "give 2 or 2.125" in refused("--seconds", 2.1)
    assert "1 at least; give 0.125" in refused("--seconds", 0) and "give 0.125" in refused("--seconds", -3)
    assert "must be a number" in refused("--seconds", "inf")
    assert "was trained for" in refused("--num-inference-steps", 7)
    assert "the last chunk of this video starts at 1.875 s" in refused("--seconds", 2, "--at", 1.9, "b")
    assert "a time from 0" in refused("--at", -1, "b")
    assert "ends in .png" in refused("--preview", "a.gif") and "at least 1, got 0" in refused("--scale", 0)
    assert "more than 16384" in refused("--scale", 9999)
    assert main(["stream", "student", "--prompt", "a", "--output", "a.gif"]) == 2


def test_a_chunk_may_start_before_the_one_before_is_finished(
    student: VideoModel, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's video is that of the cascaded contract, and its note says so."""
    assert "after 1, 2 of 2 steps" in refused("--cascade", 3)
    words = ("--prompt", "a", "--seconds", 1.5, "--cascade", 1, "--scale", 1)
    assert streamed(*words, "--dry-run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "denoised at once 2" in told and "calls of a chunk 1" in told
    assert streamed(*words, "--output", "a.mp4") == 0
    model = student.with_card(contract=cascaded(student.card.contract, 1))
    with GrowingVideo("b.mp4", fps=RATE) as video, model.stream(["a"]) as live:
        for chunk in live.frames(4, last=True):
            video.add(chunk.frames[0])
    assert torch.equal(read_video("a.mp4", 12), read_video("b.mp4", 12))
    assert streamed("--prompt", "a", "--seconds", 1.5, "--scale", 1, "--output", "c.mp4") == 0
    assert not torch.equal(read_video("c.mp4", 12), read_video("b.mp4", 12))
    assert json.loads(read_note("a.mp4"))["options"]["cascade"] == 1


def test_a_model_of_whole_clips_is_refused(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    student.with_card(contract=replace(student.card.contract, stream=None)).save("whole")
    assert main(["stream", "whole", "--prompt", "a"]) == 2
    assert "makes whole clips; use fewstep sample" in capsys.readouterr().err


def test_a_dry_run_says_what_the_stream_takes(student: VideoModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert streamed("--prompt", "a", "--seconds", 2, "--dry-run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "16 frames of" in told and "chunks 6 of 3 frames, 3 latent frames" in told
    assert "left out of the last chunk 2" in told and "calls of a chunk 2" in told and "to remember it 1" in told
    assert "6 latent frames" in told and "nothing was loaded" in told and not Path("stream.mp4").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
def test_the_memory_that_is_told_is_that_which_a_stream_takes(dtype: Any, guidance: CFG, student: VideoModel) -> None:
    student.with_card(contract=replace(student.card.contract, guidance=guidance)).save("guided")
    model = VideoModel.from_pretrained("guided", runtime=Runtime(dtype=dtype))
    with model.stream(["a"]) as live:
        next(live.frames())
        layers = live.snapshot().session.memory.layers
    held = sum(x.nbytes for layer in layers for x in layer)
    assert remembered(read_card("guided"), model.runtime) * 6 == held  # a window of 9 without the chunk itself


def test_the_first_chunk_may_be_shorter(student: VideoModel) -> None:
    contract = replace(student.card.contract, stream=Stream(chunks=(1, 3)))
    student.with_part("denoiser", repattern(student.denoiser, Dense()), contract=contract).save("student")
    assert streamed("--prompt", "a", "--seconds", 1, "--at", 0.5, "b", "--output", "a.mp4") == 0
    assert json.loads(read_note("a.mp4"))["changes"][0]["chunk"] == 2  # chunks start at frames 0, 1, 4, 7
    assert len(read_video("a.mp4", 8)) == 8


def test_pixels_are_rounded() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 9.0])).tolist() == [0, 0, 128, 128, 255, 255]


def test_a_video_is_changed(student: VideoModel, refused: Callable[..., str]) -> None:
    side = student.card.height
    with GrowingVideo("in.mp4", fps=8) as video:
        video.add(colours(9, (side, side)))
    words = ("--prompt", "a", "--seconds", 1, "--video", "in.mp4")
    assert streamed(*words, "--output", "out.mp4") == 0
    assert json.loads(read_note("out.mp4"))["options"]["video"] == "in.mp4"
    assert streamed(*words, "--strength", 1, "--output", "full.mp4") == 0
    assert streamed("--prompt", "a", "--seconds", 1, "--output", "plain.mp4") == 0
    out, full, plain = (read_video(name, 8) for name in ("out.mp4", "full.mp4", "plain.mp4"))
    assert torch.equal(full, plain) and not torch.equal(out, plain)
    x = student.codec.encode(to_floats(read_video("in.mp4", 9))[None])
    by_hand = student.stream(["a"], video=Video(lambda i: x[:, :, 3 * i : 3 * i + 3], 0.5))
    expected = torch.cat([chunk.frames[0] for chunk in by_hand.frames(3)])[:8]
    scale = out.shape[1] // side
    assert (out[:, ::scale, ::scale].float().mean((1, 2)) - expected.float().mean((1, 2))).abs().max() < 6
    assert "it has 9 frames, and the chunks of this stream 12" in refused("--seconds", 1.25, "--video", "in.mp4")
    assert "give one of its times, 1, 0.5" in refused("--seconds", 1, "--video", "in.mp4", "--strength", 0.3)
    assert "--strength is that of" in refused("--strength", 0.3)
    assert "no such file" in refused("--seconds", 1, "--video", "no.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_a_video(number: signal.Signals, student: VideoModel) -> None:
    words = [sys.executable, "-m", "fewstep", "stream", "student", "--prompt", "a", "--seconds", "600", "--quiet"]
    path = Path("stream.mp4")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not path.is_file() or path.stat().st_size < 30_000:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate()
    there = sum(1 for _ in decode(path, 0))
    assert there > 5 and json.loads(read_note(path))["prompts"] == ["a"]
    if number is signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and f"has {there} frames" in told
