"""Videos to shards to batches: resume, refusals, and what a batch holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.core import Rng, build, dump
from fewstep.core.finite import NonFiniteError
from fewstep.data import (  # fmt: skip
    DATA,
    Cut,
    Data,
    DataError,
    Keep,
    Latents,
    Part,
    Partition,
    Preparation,
    Progress,
    Prompts,
    StoredPairs,
    Texts,
    Videos,
    prepare,
    read_clips,
    read_listing,
    require,
    to_floats,
    write_video,
)
from fewstep.methods.base import Method
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel
from fewstep.world.data import WorldClips

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"
CUT = Cut(num_frames=4, height=16, width=16, stride=2, clips_per_video=2)
PLAN = Preparation(cut=CUT, shard_size=3, part_size=4)


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
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killing(after: int) -> Callable[[Progress], None]:
    def progress(event: Progress) -> None:
        if event.done == after:
            raise Killed

    return progress


# --- prepare ----------------------------------------------------------------------------------------------------------


def test_prepare_keeps_good_clips_and_reports_bad_ones(videos: Path, tmp_path: Path) -> None:
    model, seen = tiny(), []
    made = prepare(videos, tmp_path / "out", model.codec, PLAN, progress=seen.append)
    assert (made.clips, made.shards, made.report.videos) == (8, 4, 7)
    dropped = [json.loads(line) for line in (made.folder / "dropped.jsonl").read_text().splitlines()]
    reasons = {case["name"]: case["problem"] for case in dropped}
    assert reasons["v3.mp4"] == "too short: 3 of 4 frames, every 2 frames"
    assert "not a readable video" in reasons["v1.mp4"]
    assert reasons["gone.mp4"] == f"no such file: {videos / 'gone.mp4'}"
    assert {reason: (count.videos, count.clips) for reason, count in made.report.dropped.items()} == {
        "no such file": (1, 0), "not a readable video": (1, 0), "too short": (1, 0),
    }  # fmt: skip
    assert Image.open(made.folder / "dropped.png").size == (6 * 128, 3 * (72 + 14))
    assert [event.done for event in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert {event.name for event in seen if event.problem} == {"v1.mp4", "v3.mp4", "gone.mp4"}
    shards = [f"part-0000{part}/shard-0000{shard}.safetensors" for part in (0, 1) for shard in (0, 1)]
    assert [name for name in contents(made.folder) if "shard" in name] == shards
    rows = [json.loads(line) for line in (made.folder / "index.jsonl").read_text().splitlines()]
    assert rows[3] == {"part": 0, "shard": 1, "row": 0, "caption": "video number 2", "video": "v2.mp4", "start": 8}


@pytest.mark.parametrize("after", range(1, 8))
def test_killed_preparation_continues_to_the_same_bytes(videos: Path, tmp_path: Path, after: int) -> None:
    codec = tiny().codec
    whole = prepare(videos, tmp_path / "whole", codec, PLAN)
    with pytest.raises(Killed):
        prepare(videos, tmp_path / "killed", codec, PLAN, progress=killing(after))
    (tmp_path / "killed" / "part-00000" / ".shard-00002.draft.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match="not complete"):
        Latents(path=str(tmp_path / "killed")).check(tiny())
    seen: list[Progress] = []
    again = prepare(videos, tmp_path / "killed", codec, PLAN, progress=seen.append)
    assert (again.clips, again.report) == (whole.clips, whole.report)
    (tmp_path / "killed" / "part-00000" / ".shard-00002.draft.safetensors").unlink()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert after < 3 or len(seen) < 7  # the first shard is full after the third video


def test_finished_preparation_is_left_alone(videos: Path, tmp_path: Path) -> None:
    codec = tiny().codec
    first = prepare(videos, tmp_path / "out", codec, PLAN)
    shards = list(first.folder.rglob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in shards]
    assert prepare(videos, tmp_path / "out", codec, PLAN, progress=killing(1)) == first
    assert stamps == [path.stat().st_mtime_ns for path in shards]


def test_other_settings_are_refused(videos: Path, tmp_path: Path) -> None:
    out, codec = tmp_path / "out", tiny().codec
    prepare(videos, out, codec, PLAN)
    with pytest.raises(DataError, match=r"cut.stride: there 2, here 1.*another output folder"):
        prepare(videos, out, codec, replace(PLAN, cut=replace(CUT, stride=1)))
    with pytest.raises(DataError, match="codec: there"):
        prepare(videos, out, tiny(1).codec, PLAN)
    with pytest.raises(DataError, match="storage: there float16, here float32"):
        prepare(videos, out, codec, replace(PLAN, storage="float32"))
    with pytest.raises(DataError, match="keep.min_motion: there None, here 0.1"):
        prepare(videos, out, codec, replace(PLAN, keep=Keep(min_motion=0.1)))
    before = contents(out)
    with (videos / "captions.jsonl").open("a") as table:
        table.write('\n{"video": "v0.mp4", "caption": "the same again"}')
    with pytest.raises(DataError, match="lists other videos or captions than when"):
        prepare(videos, out, codec, PLAN)
    assert contents(out) == before


def test_impossible_preparations(videos: Path, tmp_path: Path) -> None:
    codec = tiny().codec
    with pytest.raises(DataError, match=r"no video gave a clip: gone.mp4.*; v0.mp4: too short: 16 of 99"):
        prepare(videos, tmp_path / "long", codec, Preparation(cut=Cut(num_frames=99, height=16, width=16)))
    with pytest.raises(ValueError, match="multiples of 4"):
        prepare(videos, tmp_path / "odd", codec, Preparation(cut=Cut(num_frames=4, height=18, width=16)))
    with torch.no_grad():
        codec.std.fill_(1e-9)
    with pytest.raises(NonFiniteError, match=r"v0.mp4.*float16"):
        prepare(videos, tmp_path / "huge", codec, PLAN)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the shared clips are not on this machine")
def test_prepare_real_clips(tmp_path: Path) -> None:
    model = tiny()
    cut = Cut(num_frames=8, height=32, width=56, stride=2, clips_per_video=0)
    made = prepare(CLIPS, tmp_path, model.codec, Preparation(cut=cut))
    assert (made.clips, made.report.dropped) == (40, {})
    source = Latents(path=str(tmp_path)).open(model, frozenset({"x0"}))
    batch = source.batch(40, Rng(0))
    assert batch.x0.shape == (40, 4, 8, 8, 14)
    assert len(set(batch.prompts)) == 8


# --- sources ----------------------------------------------------------------------------------------------------------


def test_latents_are_the_encoded_clips(videos: Path, tmp_path: Path) -> None:
    model = tiny()
    prepare(videos, tmp_path / "out", model.codec, replace(PLAN, storage="float32"))
    source = Latents(path=str(tmp_path / "out")).open(model, frozenset({"prompts", "x0"}))
    batch = source.batch(8, Rng(0))
    assert batch.latent_shape == (4, 4, 4, 4)
    assert batch.x0.shape == batch.noise_shape
    items = {item.caption: item for item in read_listing(videos)}
    for prompt, x0 in zip(batch.prompts, batch.x0):
        clips = [to_floats(clip.frames) for clip in read_clips(items[prompt].video(), CUT)]
        with torch.no_grad():
            encoded = [model.codec.encode(clip[None])[0] for clip in clips]
        assert any(torch.equal(x0, latents) for latents in encoded)
    assert torch.equal(source.batch(3, Rng(7, step=5)).x0, source.batch(3, Rng(7, step=5)).x0)


def test_latents_of_a_part_are_those_of_its_captions(videos: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class ByNumber(Partition):
        def part(self, prompt: str, encode: object = None) -> int:
            return int(prompt[-1]) % self.of

    made, drawn = prepare(videos, tmp_path / "out", tiny().codec, replace(PLAN, storage="float32")), []
    for index in range(2):
        data = Latents(path=str(tmp_path / "out"), part=Part(by=ByNumber(of=2), index=index))
        source = data.open(tiny(), frozenset({"prompts", "x0"}))
        prompts = source.batch(len(source.rows), Rng(0)).prompts  # type: ignore[attr-defined]
        assert {int(prompt[-1]) % 2 for prompt in prompts} == {index}
        drawn += prompts
    assert len(drawn) == made.clips


def test_latents_of_another_autoencoder_are_refused(videos: Path, tmp_path: Path) -> None:
    prepare(videos, tmp_path / "out", tiny().codec, PLAN)
    data = Latents(path=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"autoencoder [0-9a-f]{12}, but model 'tiny1' has [0-9a-f]{12}.*prepare"):
        data.open(tiny(1), frozenset({"x0"}))
    with pytest.raises(DataError, match=r"holds latents, not pairs. It is read by Latents"):
        StoredPairs(path=data.path).check(tiny())
    with pytest.raises(DataError, match="has no manifest.json; give a folder made for Latents"):
        Latents(path=str(videos)).check(tiny())
    (tmp_path / "out" / "part-00000" / "shard-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks shard-00000.safetensors"):
        data.open(tiny(), frozenset({"x0"}))


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
    with pytest.raises(DataError, match="has no prompts"):
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


# --- what is needed ---------------------------------------------------------------------------------------------------


class Consistency(Method):
    """Only its needs matter here."""

    needs = frozenset({"prompts", "x0"})

    def updates(self, step: int): ...


def test_missing_fields_are_refused_before_anything_is_read() -> None:
    nowhere = Prompts(path="nowhere.txt")
    with pytest.raises(DataError) as error:
        require(nowhere, Consistency())
    assert str(error.value) == (
        "Consistency needs x0; Prompts provides prompts. Use Latents (fewstep prepare), Videos or WorldClips."
    )
    with pytest.raises(DataError, match="this method needs x0; Prompts provides prompts"):
        nowhere.open(tiny(), frozenset({"x0"}))
    with pytest.raises(DataError, match=r"pairs, x0; .*Use for x0: Latents .*; for pairs: StoredPairs"):
        require(Prompts, {"x0", "pairs"})
    with pytest.raises(DataError, match="needs depth, which no batch has"):
        require(nowhere, {"depth"})
    require(WorldClips, Consistency())


@pytest.mark.parametrize("data", DATA)
def test_recipes_can_hold_any_data(data: type[Data]) -> None:
    made = data(path="somewhere")
    assert "prompts" in made.provides
    assert build(Data, dump(made, Data), {cls.__name__: cls for cls in DATA}) == made


def test_models_of_diffusers_prepare_with_their_own_encoders(videos: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fewstep.models.source import Diffusers
    from tiny_models import save_tiny

    folder, size = save_tiny("wan", tmp_path / "wan"), {"num_frames": 5, "height": 32, "width": 48}
    words = [word for name, value in size.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--model", str(folder), "--texts", "--quiet"]
    assert main(["prepare", str(videos), "--output", str(tmp_path / "out"), *words]) == 0
    model = Diffusers(source=str(folder), **size).load()
    data = Latents(path=str(tmp_path / "out"), text_cache=str(tmp_path / "out" / "texts"))
    source = data.open(model, frozenset({"prompts", "x0"}))
    model.parts["text"].encode = lambda *_: pytest.fail("encoded again")  # type: ignore[method-assign, union-attr]
    batch = source.batch(5, Rng(0))
    assert batch.x0 is not None and batch.x0.shape == (5, *model.latent_shape())
    clip = next(read_clips(read_listing(videos)[0].video(), Cut(num_frames=5, height=32, width=48)))
    with torch.no_grad():
        expected = model.codec.encode(to_floats(clip.frames)[None])[0]
    torch.testing.assert_close(batch.x0[batch.prompts.index("video number 0")], expected, atol=2e-3, rtol=2e-3)


def test_networks_that_prepare_does_not_use_stay_on_disk(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, original = [], VideoModel.from_pretrained

    def load(source: str, **options: object) -> VideoModel:
        loaded.append(original(source, **options))
        return loaded[-1]

    monkeypatch.setattr(VideoModel, "from_pretrained", load)
    assert main(["prepare", str(videos), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    on_disk = {name for name, part in loaded[0].parts.items() if next(part.parameters()).is_meta}
    assert on_disk == {"denoiser", "text"}
