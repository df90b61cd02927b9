"""Shots, limits, and the report of what was dropped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.cli import main
from fewstep.cli.pace import Pace
from fewstep.core import Rng
from fewstep.data import ClipError, Cut, Keep, Latents, Preparation, prepare, read_clips, read_listing
from fewstep.data.keep import motion
from fewstep.data.report import read_report
from fewstep.data.shots import find_cuts
from fewstep.data.video import read_facts, read_video, write_video
from fewstep.models import FrameAutoencoder, VideoModel

NEEDS = frozenset({"prompts", "x0"})
CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"


def scene(seed: int, frames: int, *, speed: int = 1, size: int = 48) -> Tensor:
    """`[3, F, size, size]`: a window that moves over a picture of coloured blobs."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(3, 8, 64, generator=generator) * 1.6 - 0.8
    picture = torch.nn.functional.interpolate(picture[None], scale_factor=8, mode="bilinear")[0]
    return torch.stack([picture[:, :size, i * speed : i * speed + size] for i in range(frames)], 1)


def cuts(video: Tensor) -> list[int]:
    frames = ((video.movedim(0, -1) + 1) * 127.5).to(torch.uint8).numpy()
    found = list(find_cuts(frames))
    assert all(np.array_equal(a, b) for a, (b, _) in zip(frames, found, strict=True))
    return [i for i, (_, is_cut) in enumerate(found) if is_cut]


def test_cuts_are_found_and_motion_is_none() -> None:
    video = torch.cat([scene(0, 10), scene(1, 7), scene(2, 12)], 1)
    assert cuts(video) == [10, 17]
    assert cuts(scene(3, 40, speed=8)) == []
    assert cuts(video[:, :1]) == [] == cuts(video[:, :0])


def test_flashes_and_slow_fades_are_no_cuts() -> None:
    video = scene(0, 20)
    video[:, 8] = 0.95
    assert cuts(video) == []
    fade = (scene(0, 40) + 1) * torch.linspace(1, 0, 40)[:, None, None] - 1
    assert cuts(fade) == []


def test_every_shot_gives_one_clip_at_most(tmp_path: Path) -> None:
    video = torch.cat([scene(0, 10), scene(1, 3), scene(2, 12)], 1)
    path = write_video(tmp_path / "film.mp4", video)
    plain = Cut(num_frames=4, height=16, width=16, clips_per_video=0)
    assert [clip.start for clip in read_clips(path, plain)] == [0, 4, 8, 12, 16, 20]
    shots = Cut(num_frames=4, height=16, width=16, clips_per_video=0, shots=True)
    clips = list(read_clips(path, shots))
    assert [(clip.start, clip.problem) for clip in clips] == [
        (0, ""), (10, "shot too short: 3 of 4 frames"), (13, ""),
    ]  # fmt: skip
    assert torch.equal(clips[2].frames, read_video(path, 4, size=(16, 16), start=13))
    strided = Cut(num_frames=4, height=16, width=16, stride=3, clips_per_video=0, shots=True)
    assert [(clip.start, clip.problem[:4]) for clip in read_clips(path, strided)] == [(0, ""), (10, "shot"), (13, "")]
    first = Cut(num_frames=4, height=16, width=16, clips_per_video=1, shots=True)
    assert [clip.start for clip in read_clips(path, first)] == [0]


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not on this machine")
def test_real_clips_have_cuts_only_where_they_were_joined(tmp_path: Path) -> None:
    items = read_listing(CLIPS)
    joined = torch.cat([read_video(item.path, 30, size=(72, 128)) for item in items])
    assert [i for i, (_, is_cut) in enumerate(find_cuts(joined.numpy())) if is_cut] == list(range(30, 240, 30))
    for item in items:
        assert not any(is_cut for _, is_cut in find_cuts(read_video(item.path, 81).numpy()))


def test_facts_are_read_from_the_head(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scene(0, 12)[:, :, :32], fps=8)
    facts = read_facts(path)
    assert facts.seconds == pytest.approx(1.5) and facts.side == 32
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ClipError, match="not a readable video"):
        read_facts(tmp_path / "text.mp4")


def test_limits_say_what_they_measured(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", scene(0, 12)[:, :, :32], fps=8)
    assert Keep(min_seconds=2).of_video(path) == "duration: 1.5, at least 2"
    assert Keep(max_seconds=1).of_video(path) == "duration: 1.5, at most 1"
    assert Keep(min_side=64).of_video(path) == "resolution: 32, at least 64"
    assert Keep(min_seconds=1, max_seconds=2, min_side=32).of_video(path) == ""
    assert Keep().of_video(tmp_path / "absent.mp4") == ""  # nothing to look for
    still = torch.full((3, 4, 4, 3), 51, dtype=torch.uint8)
    assert Keep(min_motion=0.001).of_clip(still) == "motion: 0, at least 0.001"
    assert Keep(min_brightness=0.25).of_clip(still) == "brightness: 0.2, at least 0.25"
    assert Keep(max_brightness=0.1).of_clip(still) == "brightness: 0.2, at most 0.1"
    assert Keep(max_motion=0, min_brightness=0.1, max_brightness=0.9).of_clip(still) == ""
    black_and_white = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3)
    assert motion(black_and_white) == 1.0
    with pytest.raises(ValueError, match=r"min_motion 0.5 is above max_motion 0.1, so nothing would be kept"):
        Keep(min_motion=0.5, max_motion=0.1)


def test_what_is_dropped_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    films = {
        "moving": scene(0, 8), "still": scene(0, 1).expand(3, 8, 48, 48), "dark": scene(0, 8) * 0.1 - 0.89,
        "brief": scene(0, 4), "film": torch.cat([scene(1, 6), scene(2, 2), scene(3, 6)], 1),
    }  # fmt: skip
    for name, film in films.items():
        write_video(folder / f"{name}.mp4", film).with_suffix(".txt").write_text(name)
    (folder / "text.mp4").write_text("not a video")
    (folder / "text.txt").write_text("text")
    (folder / "mute.mp4").write_text("no caption")
    cut = Cut(num_frames=4, height=16, width=16, clips_per_video=0, shots=True)
    keep = Keep(min_seconds=0.6, min_motion=0.002, min_brightness=0.1)
    torch.manual_seed(0)
    codec = FrameAutoencoder(width=8, depth=1)
    made = prepare(folder, tmp_path / "out", codec, Preparation(cut=cut, keep=keep, part_size=3))
    assert {reason: (count.videos, count.clips) for reason, count in made.report.dropped.items()} == {
        "brightness": (0, 1), "duration": (1, 0), "motion": (0, 1), "no caption": (1, 0), "not a readable video": (1, 0),
        "shot too short": (0, 1),
    }  # fmt: skip
    assert made.report.videos == 7 and made.clips == made.report.clips == 3
    assert made.report.dropped["duration"].example == "brief.mp4: duration: 0.5, at least 0.6"
    assert read_report(made.folder) == made.report
    rows = [json.loads(line) for line in (made.folder / "index.jsonl").read_text().splitlines()]
    assert [(row["video"], row["start"]) for row in rows] == [("film.mp4", 0), ("film.mp4", 8), ("moving.mp4", 0)]
    cases = [json.loads(line) for line in (made.folder / "dropped.jsonl").read_text().splitlines()]
    assert {(case["name"], case["start"]) for case in cases} == {
        ("still.mp4", 0), ("dark.mp4", 0), ("brief.mp4", None), ("film.mp4", 6), ("text.mp4", None), ("mute.mp4", None),
    }  # fmt: skip
    picture = np.asarray(Image.open(made.folder / "dropped.png"))
    dark, grey = picture[14:86, :128], picture[3 * 86 + 14 : 4 * 86, :128]  # brightness; no caption, so no frame
    assert dark.mean() < 40 and (grey == 160).all()


def test_the_command_line_reports_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("small", 32), ("large", 48)):
        path = write_video(tmp_path / "videos" / "YoYo" / f"{name}.mp4", scene(0, 20, size=size))
        assert path.is_file()
    words = ["prepare", str(tmp_path / "videos"), "--layout", "ucf101", "--output", str(tmp_path / "out")]
    assert main([*words, "--min-side", "40", "--shots", "--texts", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "1 clips in 1 shards, from 2 videos" in out
    assert next(line for line in out.splitlines() if line.startswith("resolution")).split()[1] == "1"
    model = VideoModel.from_pretrained("world")
    source = Latents(path=str(tmp_path / "out"), text_cache=str(tmp_path / "out" / "texts")).open(model, NEEDS)
    model.parts["text"].encode = lambda *_: pytest.fail("encoded again")  # type: ignore[method-assign, union-attr]
    assert source.batch(1, Rng(0)).prompts == ("yo yo",)
    assert main([*words[:-1], str(tmp_path / "none"), "--min-side", "400", "--quiet"]) == 2
    assert "no video gave a clip: YoYo/large.mp4: resolution: 48, at least 400" in capsys.readouterr().err
    assert main([*words, "--device", "warp", "--quiet"]) == 2


def test_pace_counts_from_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    pace = Pace(first=5000, began=100.0)  # 5000 were done by an earlier run
    assert pace.line("videos", 5020, 6000) == "videos: 5,020 of 6,000, 2 per second, 0:08:10 left"
    assert pace.line("videos", 35_000, 35_000) == "videos: 35,000 of 35,000, 3,000 per second"
