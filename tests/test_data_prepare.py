"""Videos to shards to batches: resume, refusals, and what a batch holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewstep.core import Rng, build, dump
from fewstep.core.finite import NonFiniteError
from fewstep.data import (
    DATA,
    Cut,
    Data,
    DataError,
    Latents,
    Progress,
    Prompts,
    StoredPairs,
    Texts,
    Videos,
    draw_indices,
    prepare,
    read_clips,
    read_listing,
    require,
    to_floats,
    write_video,
)  # fmt: skip
from fewstep.methods.base import Method
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel
from fewstep.world.data import WorldClips

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"
CUT = Cut(num_frames=4, height=16, width=16, stride=2, clips_per_video=2)


class Killed(Exception):
    """Stands for a signal."""


def tiny(seed: int = 0) -> VideoModel:
    torch.manual_seed(seed)
    parts = {"codec": FrameAutoencoder(width=8, depth=1), "text": TextEncoder(width=16, length=8, buckets=64, depth=1)}
    return VideoModel(Card(name=f"tiny{seed}", num_frames=4, height=16, width=16), parts)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four good videos of two clips each, one damaged, one too short, one that is listed but absent."""
    folder = tmp_path / "videos"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number, frames in enumerate((16, 18, 16, 5, 19, 16)):
        clip = torch.rand(3, frames, 4, 6, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
        path = write_video(folder / f"v{number}.mp4", clip)
        if number == 1:
            path.write_bytes(path.read_bytes()[:-200])
        lines.append({"video": path.name, "caption": f"video number {number}"})
    lines.append({"video": "gone.mp4", "caption": "gone"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killing(after: int) -> Callable[[Progress], None]:
    def progress(event: Progress) -> None:
        if event.done == after:
            raise Killed

    return progress


# --- prepare ----------------------------------------------------------------------------------------------------------


def test_prepare_keeps_good_clips_and_reports_bad_ones(videos: Path, tmp_path: Path) -> None:
    model, seen = tiny(), []
    made = prepare(videos, tmp_path / "out", model.codec, CUT, shard_size=3, progress=seen.append)
    assert (made.clips, made.shards) == (8, 3)
    reasons = dict(made.skipped)
    assert reasons["v3.mp4"] == "too short: 3 of 4 frames, every 2 frames"
    assert "not a readable video" in reasons["v1.mp4"]
    assert "no such file" in reasons["gone.mp4"]
    assert [event.done for event in seen] == [1, 2, 3, 4, 5, 6]
    assert {event.name for event in seen if event.problem} == {"v1.mp4", "v3.mp4"}
    assert set(contents(made.folder)) == {
        "index.jsonl", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors",
    }  # fmt: skip
    rows = [json.loads(line) for line in (made.folder / "index.jsonl").read_text().splitlines()]
    assert rows[3] == {"shard": 1, "row": 0, "caption": "video number 2", "video": "v2.mp4", "start": 8}


@pytest.mark.parametrize("after", range(1, 7))
def test_killed_preparation_continues_to_the_same_bytes(videos: Path, tmp_path: Path, after: int) -> None:
    codec = tiny().codec
    whole = prepare(videos, tmp_path / "whole", codec, CUT, shard_size=3)
    with pytest.raises(Killed):
        prepare(videos, tmp_path / "killed", codec, CUT, shard_size=3, progress=killing(after))
    (tmp_path / "killed" / ".shard-00002.draft.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match="not complete"):
        Latents(path=str(tmp_path / "killed")).check(tiny())
    seen: list[Progress] = []
    again = prepare(videos, tmp_path / "killed", codec, CUT, shard_size=3, progress=seen.append)
    assert (again.clips, again.skipped) == (whole.clips, whole.skipped)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert after < 3 or len(seen) < 6  # the first shard is full after the third video


def test_finished_preparation_is_left_alone(videos: Path, tmp_path: Path) -> None:
    codec = tiny().codec
    first = prepare(videos, tmp_path / "out", codec, CUT)
    stamps = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(videos, tmp_path / "out", codec, CUT, progress=killing(1)) == first
    assert stamps == {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_other_settings_are_refused(videos: Path, tmp_path: Path) -> None:
    out, codec = tmp_path / "out", tiny().codec
    prepare(videos, out, codec, CUT)
    with pytest.raises(DataError, match=r"cut.stride: there 2, here 1.*another output folder"):
        prepare(videos, out, codec, Cut(num_frames=4, height=16, width=16, clips_per_video=2))
    with pytest.raises(DataError, match="codec: there"):
        prepare(videos, out, tiny(1).codec, CUT)
    with pytest.raises(DataError, match="storage: there float16, here float32"):
        prepare(videos, out, codec, CUT, storage="float32")
    (videos / "gone.mp4").write_bytes((videos / "v0.mp4").read_bytes())
    with pytest.raises(DataError, match="listing: there"):
        prepare(videos, out, codec, CUT)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"shards but no manifest.json"):
        prepare(videos, out, codec, CUT)


def test_impossible_preparations(videos: Path, tmp_path: Path) -> None:
    codec = tiny().codec
    with pytest.raises(DataError, match=r"no video gave a clip: gone.mp4|no video gave a clip: v0"):
        prepare(videos, tmp_path / "long", codec, Cut(num_frames=99, height=16, width=16))
    with pytest.raises(ValueError, match="multiples of 4"):
        prepare(videos, tmp_path / "odd", codec, Cut(num_frames=4, height=18, width=16))
    with torch.no_grad():
        codec.std.fill_(1e-9)
    with pytest.raises(NonFiniteError, match=r"v0.mp4.*float16"):
        prepare(videos, tmp_path / "huge", codec, CUT)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not on this machine")
def test_prepare_real_clips(tmp_path: Path) -> None:
    model = tiny()
    made = prepare(CLIPS, tmp_path, model.codec, Cut(num_frames=8, height=32, width=56, stride=2, clips_per_video=0))
    assert (made.clips, made.skipped) == (40, ())
    source = Latents(path=str(tmp_path)).open(model, frozenset({"x0"}))
    batch = source.batch(40, Rng(0))
    assert batch.x0.shape == (40, 4, 8, 8, 14)
    assert len(set(batch.prompts)) == 8


# --- sources ----------------------------------------------------------------------------------------------------------


def test_latents_are_the_encoded_clips(videos: Path, tmp_path: Path) -> None:
    model = tiny()
    prepare(videos, tmp_path / "out", model.codec, CUT, storage="float32", shard_size=3)
    source = Latents(path=str(tmp_path / "out")).open(model, frozenset({"prompts", "x0"}))
    batch = source.batch(8, Rng(0))
    assert batch.latent_shape == (4, 4, 4, 4)
    assert batch.x0.shape == batch.noise_shape
    items = {item.caption: item for item in read_listing(videos).items}
    for prompt, x0 in zip(batch.prompts, batch.x0):
        clips = [to_floats(clip.frames) for clip in read_clips(items[prompt].path, CUT)]
        with torch.no_grad():
            encoded = [model.codec.encode(clip[None])[0] for clip in clips]
        assert any(torch.equal(x0, latents) for latents in encoded)
    assert torch.equal(source.batch(3, Rng(7, step=5)).x0, source.batch(3, Rng(7, step=5)).x0)


def test_latents_of_another_autoencoder_are_refused(videos: Path, tmp_path: Path) -> None:
    prepare(videos, tmp_path / "out", tiny().codec, CUT)
    data = Latents(path=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"autoencoder [0-9a-f]{12}, but model 'tiny1' has [0-9a-f]{12}.*prepare"):
        data.open(tiny(1), frozenset({"x0"}))
    with pytest.raises(DataError, match=r"holds latents, not pairs. It is read by Latents"):
        StoredPairs(path=data.path).check(tiny())
    with pytest.raises(DataError, match=r"no manifest.json there. It is a folder made for Latents"):
        Latents(path=str(videos)).check(tiny())
    (tmp_path / "out" / "shard-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks shard-00000.safetensors"):
        data.open(tiny(), frozenset({"x0"}))


@pytest.mark.parametrize("cached", [False, True])
def test_videos_give_pixels(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: bool) -> None:
    cache = str(tmp_path / "cache") if cached else ""
    data = Videos(path=str(videos), num_frames=4, height=16, width=16, stride=2, clips_per_video=2, cache=cache)
    with caplog.at_level(logging.WARNING):
        source = data.open(tiny(), frozenset({"frames"}))
    assert sum("skipped" in message for message in caplog.messages) == 3
    batch = source.batch(8, Rng(0))
    assert batch.frames.shape == (8, 3, 4, 16, 16)
    assert batch.latent_shape == (4, 4, 4, 4)
    assert sorted(set(batch.prompts)) == [f"video number {i}" for i in (0, 2, 4, 5)]
    if cached:
        assert len(list((tmp_path / "cache").iterdir())) == 4
        assert torch.equal(data.open(tiny(), frozenset({"frames"})).batch(8, Rng(0)).frames, batch.frames)


def test_pixels_need_neither_text_encoder_nor_autoencoder(videos: Path) -> None:
    bare = VideoModel(Card(name="bare"), {})
    data = Videos(path=str(videos), num_frames=4, height=16, width=16)
    batch = data.open(bare, frozenset({"frames"})).batch(2, Rng(0))
    assert len(batch) == 2
    assert batch.latent_shape == (3, 4, 16, 16)
    with pytest.raises(ValueError, match="has no text"):
        data.open(bare, frozenset({"prompts", "frames"}))


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\n\n  a blue box \nein grüner Kreis\n", encoding="utf-8")
    source = Prompts(path=str(path)).open(tiny(), frozenset({"prompts"}))
    batch = source.batch(3, Rng(0))
    assert set(batch.prompts) == {"a red ball", "a blue box", "ein grüner Kreis"}
    assert batch.latent_shape == tiny().latent_shape()
    assert batch.x0 is None
    path.write_text("\n \n")
    with pytest.raises(DataError, match="no prompts in it"):
        Prompts(path=str(path)).open(tiny(), frozenset({"prompts"}))
    with pytest.raises(DataError, match="no such file"):
        Prompts(path="nowhere.txt").open(tiny(), frozenset({"prompts"}))


def test_text_states_depend_on_the_prompt_only() -> None:
    model = tiny()
    fresh, used = Texts(model, frozenset({"prompts"})), Texts(model, frozenset({"prompts"}))
    used(["three", "other", "prompts"], "cpu")
    cond, uncond = used(["a red ball", "three"], "cpu")
    alone, null = fresh(["three"], "cpu")
    assert torch.equal(cond.text[1], alone.text[0])
    assert torch.equal(uncond.text, null.text.expand(2, -1, -1))
    expected = model.text.encode(["a red ball", "three"])
    torch.testing.assert_close(cond.text, expected.text)
    assert torch.equal(cond.mask, expected.mask)
    assert not cond.text.requires_grad


# --- what is drawn, what is needed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 10, 25])
def test_every_epoch_has_every_sample_once(size: int) -> None:
    n = 10
    stream = [i for step in range(40) for i in draw_indices(n, size, Rng(3, step=step, place=1))]
    epochs = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # shuffled anew each time
    assert draw_indices(n, size, Rng(3, step=17, place=1)) == stream[17 * size : 18 * size]


def test_places_and_seeds_draw_differently() -> None:
    assert draw_indices(1000, 8, Rng(0)) != draw_indices(1000, 8, Rng(0, place=1))
    assert draw_indices(1000, 8, Rng(0)) != draw_indices(1000, 8, Rng(1))


class Consistency(Method):
    """Only its needs matter here."""

    needs = frozenset({"prompts", "x0"})

    def updates(self, step: int): ...


def test_missing_fields_are_refused_before_anything_is_read() -> None:
    nowhere = Prompts(path="nowhere.txt")
    with pytest.raises(DataError) as error:
        require(nowhere, Consistency())
    assert str(error.value) == (
        "Consistency needs x0; Prompts provides prompts. Use Latents (fewstep prepare) or WorldClips."
    )
    with pytest.raises(DataError, match="this method needs x0; Prompts provides prompts"):
        nowhere.open(tiny(), frozenset({"x0"}))
    with pytest.raises(DataError, match=r"pairs, x0; .*Use for x0: Latents .*; for pairs: StoredPairs"):
        require(Videos, {"x0", "pairs"})
    with pytest.raises(DataError, match="needs depth, which no batch has"):
        require(nowhere, {"depth"})
    require(WorldClips, Consistency())


@pytest.mark.parametrize("data", DATA)
def test_recipes_can_hold_any_data(data: type[Data]) -> None:
    made = data(path="somewhere")
    assert "prompts" in made.provides
    assert build(Data, dump(made, Data), {cls.__name__: cls for cls in DATA}) == made
