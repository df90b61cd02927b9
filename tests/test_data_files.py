"""Video files drawn as they lie on disk: what a batch holds, and what becomes of files that cannot be used."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.core import Batch, Rng
from fewstep.data import DataError, Keep, Videos, read_clips, to_floats, write_video
from fewstep.data.listing import Listing, open_listing
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel

pytestmark = pytest.mark.usefixtures("single_thread")
NEEDS = frozenset({"prompts", "frames", "x0"})
GOOD = 6


@pytest.fixture
def model() -> VideoModel:
    torch.manual_seed(0)
    parts = {"codec": FrameAutoencoder(width=8, depth=1), "text": TextEncoder(width=16, length=8, buckets=64, depth=1)}
    return VideoModel(Card(name="tiny", num_frames=2, height=16, width=16), parts)


@pytest.fixture
def data(tmp_path: Path) -> Videos:
    """Six videos of two clips each, of twelve greys; a damaged one, an absent one and one without caption."""
    folder, lines = tmp_path / "videos", []
    for number in range(GOOD):
        first, second = (torch.full((3, 2, 16, 16), -0.9 + 0.15 * (2 * number + k)) for k in (0, 1))
        write_video(folder / f"v{number}.mp4", torch.cat([first, second], 1))
        lines.append({"video": f"v{number}.mp4", "caption": f"video number {number}"})
    (folder / "damaged.mp4").write_bytes((folder / "v0.mp4").read_bytes()[:-200])
    lines += [
        {"video": "damaged.mp4", "caption": "damaged"},
        {"video": "gone.mp4", "caption": "gone"},
        {"video": "v0.mp4", "caption": ""},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Videos(path=str(folder), num_frames=2, height=16, width=16, clips_per_video=2)


def equal(a: Batch, b: Batch) -> bool:
    return a.prompts == b.prompts and all(torch.equal(a.require(name), b.require(name)) for name in ("frames", "x0"))


def test_a_batch_does_not_depend_on_those_before_it(data: Videos, model: VideoModel, tmp_path: Path) -> None:
    walked = data.open(model, NEEDS)
    stream = [[walked.batch(4, Rng(0, step=step, place=place)) for place in (0, 1)] for step in range(5)]
    others = {
        "nothing held": replace(data, hold_mib=0), "one thread": replace(data, threads=1),
        "cached": replace(data, cache=str(tmp_path / "cache")), "cached before": replace(data, cache=str(tmp_path / "cache")),
    }  # fmt: skip
    for other in others.values():
        fresh = other.open(model, NEEDS)
        for step in (4, 1):
            for place in (0, 1):
                assert equal(fresh.batch(4, Rng(0, step=step, place=place)), stream[step][place])
    assert not equal(stream[0][0], stream[0][1])


def test_clips_are_those_of_the_caption_and_latents_are_theirs(data: Videos, model: VideoModel) -> None:
    batch = data.open(model, NEEDS).batch(32, Rng(1))
    assert batch.frames is not None and batch.x0 is not None
    clips = {
        f"video number {n}": [to_floats(clip.frames) for clip in read_clips(Path(data.path) / f"v{n}.mp4", data.cut)]
        for n in range(GOOD)
    }
    used = set()
    for prompt, frames, x0 in zip(batch.prompts, batch.frames, batch.x0, strict=True):
        which = [torch.equal(frames, clip) for clip in clips[prompt]]
        assert sum(which) == 1
        used.add((prompt, which.index(True)))
        torch.testing.assert_close(x0, model.codec.encode(frames[None])[0].detach())
    assert {which for _, which in used} == {0, 1} and {prompt for prompt, _ in used} == {*clips}


def test_an_epoch_has_every_good_video(data: Videos, model: VideoModel) -> None:
    prompts = data.open(model, NEEDS).batch(GOOD + 3, Rng(0)).prompts
    assert set(prompts) == {
        f"video number {n}" for n in range(GOOD)
    }  # three more in place of those that cannot be used


def test_what_cannot_be_used_is_named_once(data: Videos, model: VideoModel, caplog: pytest.LogCaptureFixture) -> None:
    source = data.open(model, NEEDS)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            source.batch(9, Rng(0, step=step))
    skipped = sorted(message for message in caplog.messages if "skipped" in message)
    assert len(skipped) == 3
    assert skipped[0].startswith("damaged.mp4 skipped: not a readable video")
    assert skipped[1].startswith("gone.mp4 skipped: no such file") and skipped[2].startswith(
        "v0.mp4 skipped: no caption"
    )


def test_nothing_usable_stops_the_run(data: Videos, model: VideoModel) -> None:
    dark = replace(data, keep=Keep(max_brightness=0.0))
    with pytest.raises(
        DataError, match=r"100 videos in a row gave no clip \(.*brightness: .* Check that the disk is mounted"
    ):
        dark.open(model, NEEDS).batch(1, Rng(0))
    with pytest.raises(DataError, match="no such file or folder"):
        replace(data, path="nowhere").check_card(model.card)


def test_a_kept_list_is_made_once(data: Videos, model: VideoModel, tmp_path: Path) -> None:
    kept = replace(data, listing=str(tmp_path / "lists" / "videos.jsonl"))
    before = kept.open(model, NEEDS).batch(4, Rng(0))
    (Path(data.path) / "captions.jsonl").unlink()  # it is not read again
    assert equal(kept.open(model, NEEDS).batch(4, Rng(0)), before)
    assert len(Listing(kept.listing, data.path)) == len(open_listing(data.path, file=kept.listing)) == GOOD + 3


def test_stored_texts_serve_files_too(data: Videos, model: VideoModel, tmp_path: Path) -> None:
    source = replace(data, text_cache=str(tmp_path / "texts")).open(model, NEEDS)
    fresh = data.open(model, NEEDS).batch(4, Rng(0))
    model.parts["text"].encode = lambda *_: pytest.fail("encoded again")  # type: ignore[method-assign, union-attr]
    assert torch.equal(source.batch(4, Rng(0)).cond.text, fresh.cond.text)
