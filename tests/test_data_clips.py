"""Decoding ahead, encoding in batches, and what a broken file, a full disk or a lost one do to a long preparation."""

from __future__ import annotations

import json
import random
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.data import Cut, DataError, Keep, Preparation, Progress, prepare, write_video
from fewstep.data.clips import ahead, clips_of
from fewstep.data.layouts import Item
from fewstep.data.store import ShardReader
from fewstep.data.video import ClipError
from fewstep.models import FrameAutoencoder

pytestmark = pytest.mark.usefixtures("single_thread")
CUT = Cut(num_frames=2, height=16, width=16, clips_per_video=0)
PLAN = Preparation(cut=CUT, shard_size=6, part_size=5, batch=1, storage="float32")
VIDEOS, CLIPS = 7, 3


class Killed(Exception):
    """Stands for a signal."""


def codec() -> FrameAutoencoder:
    torch.manual_seed(0)
    return FrameAutoencoder(width=8, depth=1)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven videos of three clips of noise each."""
    folder, generator = tmp_path / "videos", torch.Generator().manual_seed(0)
    for number in range(VIDEOS):
        path = write_video(folder / f"v{number}.mp4", torch.rand(3, 2 * CLIPS, 24, 32, generator=generator) * 2 - 1)
        path.with_suffix(".txt").write_text(f"video number {number}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def latents(folder: Path) -> torch.Tensor:
    reader = ShardReader(folder, "latents")
    return reader.read("latents", range(len(reader)))


# --- ahead ------------------------------------------------------------------------------------------------------------


def counting(first: int, count: int, seen: list[int]) -> Iterator[int]:
    for number in range(first, first + count):
        if number == 13:
            raise ClipError("thirteen")
        seen.append(number)
        yield number


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_everything_comes_in_order_and_errors_in_their_place(threads: int, depth: int) -> None:
    sources = [(key, partial(counting, 10 * key, 5, [])) for key in range(4)]
    came = []
    for key, elements in ahead(sources, threads=threads, window=2, depth=depth):
        try:
            for element in elements:
                came.append((key, element))
        except ClipError:
            came.append((key, "error"))
    assert came == [
        *((0, n) for n in range(5)), *((1, n) for n in (10, 11, 12)), (1, "error"),
        *((key, 10 * key + n) for key in (2, 3) for n in range(5)),
    ]  # fmt: skip


def test_the_next_are_read_while_one_is_used_but_not_all() -> None:
    seen: list[int] = []
    ready = threading.Event()

    def source(key: int) -> Iterator[int]:
        yield from counting(10 * key, 5, seen)
        if key == 2:
            ready.set()

    reader = ahead(((key, partial(source, key)) for key in range(9)), threads=2, window=2, depth=9)
    _, elements = next(reader)
    assert next(elements) == 0 and ready.wait(10)  # nobody has asked for 20 yet
    assert max(seen) < 30
    reader.close()


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_change_last_bits_at_most(videos: Path, tmp_path: Path) -> None:
    one = prepare(videos, tmp_path / "one", codec(), PLAN)
    for batch in (2, 4, 16):
        more = prepare(videos, tmp_path / str(batch), codec(), replace(PLAN, batch=batch, threads=2))
        for name in ("index.jsonl", "report.json", "manifest.json"):
            assert (more.folder / name).read_bytes() == (one.folder / name).read_bytes()
        torch.testing.assert_close(latents(more.folder), latents(one.folder), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("after", range(1, VIDEOS))
def test_a_pass_that_goes_on_forms_the_same_batches(videos: Path, tmp_path: Path, after: int) -> None:
    plan, sizes = replace(PLAN, batch=4), list[int]()
    encoding = codec()
    encode = encoding.encode

    def noted(frames: torch.Tensor, **options: bool) -> torch.Tensor:
        sizes.append(len(frames))
        return encode(frames, **options)

    def killing(event: Progress) -> None:
        if event.done == after:
            raise Killed

    encoding.encode = noted  # type: ignore[method-assign]
    prepare(videos, tmp_path / "whole", encoding, plan)
    assert sizes == [4, 2, 4, 2, 3, 4, 2]  # shards of 6, parts of 15 and 6
    with pytest.raises(Killed):
        prepare(videos, tmp_path / "killed", encoding, plan, progress=killing)
    prepare(videos, tmp_path / "killed", encoding, plan)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_autocast_is_what_was_asked_for(videos: Path, tmp_path: Path) -> None:
    exact = latents(prepare(videos, tmp_path / "off", codec(), PLAN).folder)
    half = latents(prepare(videos, tmp_path / "bf16", codec(), replace(PLAN, autocast="bf16")).folder)
    assert 0 < float((half - exact).abs().max()) < 0.05
    with pytest.raises(DataError, match="autocast: there off, here bf16"):
        prepare(videos, tmp_path / "off", codec(), replace(PLAN, autocast="bf16"))


def test_a_codec_that_takes_one_clip_refuses_batches(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fewstep.models.adapters.codecs.codec import VideoCodec

    wan = VideoCodec(
        config={"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    )
    plan = Preparation(cut=Cut(num_frames=5, height=16, width=16), batch=2)
    with pytest.raises(ValueError, match="VideoCodec encodes one clip at a time, .* leave batch out"):
        prepare("nowhere", tmp_path, wan, plan)  # type: ignore[arg-type]


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_whatever_is_in_a_file_it_costs_that_file_alone(videos: Path, tmp_path: Path) -> None:
    whole, chance = (videos / "v0.mp4").read_bytes(), random.Random(0)
    broken = {"empty": b"", "text": b"not a video", "zeros": bytes(4096), "half": whole[: len(whole) // 2]}
    for number in range(24):
        damaged = bytearray(whole)
        for _ in range(1 + 20 * (number % 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        broken[f"flipped{number}"] = bytes(damaged)
    for name, content in broken.items():
        (videos / f"x-{name}.mp4").write_bytes(content)
        (videos / f"x-{name}.txt").write_text(name)
    (videos / "x-folder.mp4").mkdir()
    (videos / "x-folder.txt").write_text("a folder")
    made = prepare(videos, tmp_path / "out", codec(), PLAN)
    good = {json.loads(line)["video"] for line in (made.folder / "index.jsonl").read_text().splitlines()}
    dropped = {json.loads(line)["name"] for line in (made.folder / "dropped.jsonl").read_text().splitlines()}
    assert {f"v{n}.mp4" for n in range(VIDEOS)} <= good
    assert good | dropped == {path.name for path in videos.glob("*.mp4")}
    assert {"x-empty.mp4", "x-text.mp4", "x-zeros.mp4", "x-half.mp4", "x-folder.mp4"} <= dropped - good


def test_errors_of_reading_are_problems_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for path in (tmp_path / "loop.mp4", tmp_path / ("x" * 300 + ".mp4")):
        with pytest.raises(ClipError):
            next(clips_of(Item("name", path, "caption"), CUT, Keep()))


@pytest.mark.parametrize("mounted", [False, True])
def test_a_lost_disk_stops_the_run_and_costs_nothing(videos: Path, tmp_path: Path, mounted: bool) -> None:
    away = videos.with_name("away")

    def unmount(event: Progress) -> None:
        if event.done == 2:
            videos.rename(away)
            if mounted:  # the empty folder stays
                videos.mkdir()

    whole = prepare(videos, tmp_path / "whole", codec(), PLAN)
    with pytest.raises(DataError, match=r"videos is empty or has disappeared, .* same command again to continue"):
        prepare(videos, tmp_path / "out", codec(), replace(PLAN, threads=1), progress=unmount)
    if mounted:
        videos.rmdir()
    away.rename(videos)
    assert prepare(videos, tmp_path / "out", codec(), PLAN).report == whole.report
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_said_and_costs_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", str(videos), "--num-frames", "2", "--height", "64", "--width", "64", "--clips-per-video", "0"]
    assert main([*words, "--output", str(tmp_path / "whole"), "--quiet"]) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = main([*words, "--output", str(tmp_path / "out"), "--quiet"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "shard-00000.safetensors cannot be written: " in (said := capsys.readouterr().err), said
    assert "run the same command again" in said
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert main([*words, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
