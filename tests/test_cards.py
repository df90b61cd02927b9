"""What a card vouches for, and what it may not do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fewstep.core import RecipeError
from fewstep.core.stamp import stamp_of
from fewstep.engine.prepare import prepare
from fewstep.evaluate.features.extractors import feature_map
from fewstep.methods import AVDM2
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel, fingerprint
from fewstep.models.bundle import read_card
from fewstep.models.source import Pretrained, Scratch
from fewstep.models.spec import Spec
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model


def model() -> VideoModel:
    parts = {"codec": FrameAutoencoder(width=8, depth=1), "text": TextEncoder(width=16, buckets=64, depth=1)}
    return VideoModel(Card(name="tiny"), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fingerprints_are_those_of_the_weights_as_they_load(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = model().save(tmp_path, dtype=dtype)
    loaded = VideoModel.from_pretrained(folder)
    assert read_card(folder).fingerprints == {name: fingerprint(part) for name, part in loaded.parts.items()}
    changed = loaded.with_part("codec", FrameAutoencoder(width=8, depth=1))
    assert set(changed.card.fingerprints) == {"text"}  # nobody has looked at the new codec yet


def test_a_model_from_scratch_knows_what_it_takes(tmp_path: Path) -> None:
    folder = model().save(tmp_path)
    text = Scratch(codec=str(folder)).card()
    assert text.fingerprints == {"codec": read_card(folder).fingerprints["codec"]}


def test_a_card_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outsider.py").write_text(
        "from fewstep.models import FrameAutoencoder\nclass Mine(FrameAutoencoder): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = model().save(tmp_path / "model")
    card = json.loads((folder / "card.json").read_text())
    card["parts"]["codec"]["type"] = "outsider:Mine"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(RecipeError, match=r"card.json: parts.codec.type is 'outsider:Mine'.*import outsider"):
        read_card(folder)
    assert "outsider" not in sys.modules
    __import__("outsider")  # what a caller does who trusts it
    try:
        assert type(VideoModel.from_pretrained(folder).codec).__name__ == "Mine"
    finally:
        del sys.modules["outsider"]


def test_a_torn_card_is_said_to_be_torn(tmp_path: Path) -> None:
    path = model().save(tmp_path) / "card.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecipeError, match=r"card.json is not a card: .*copy the folder again"):
        read_card(tmp_path)


def test_weights_may_stay_in_their_file(tmp_path: Path) -> None:
    teacher = tiny_model()
    teacher.save(tmp_path)
    left = VideoModel.from_pretrained(tmp_path, leave=("denoiser",))
    assert all(p.is_meta for p in left.denoiser.parameters()) and not next(left.codec.parameters()).is_meta
    weights = left.weights("denoiser")
    assert weights.keys() == teacher.denoiser.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in teacher.denoiser.state_dict().items())
    assert left.fingerprint("denoiser") == teacher.fingerprint("denoiser") == left.card.fingerprints["denoiser"]
    assert left.weights("codec").keys() == teacher.codec.state_dict().keys()
    (tmp_path / "codec.safetensors").replace(tmp_path / "denoiser.safetensors")
    with pytest.raises(RecipeError, match=r"denoiser\.safetensors: tensors do not match the card's network"):
        VideoModel.from_pretrained(tmp_path, leave=("denoiser",))


def test_built_in_models_are_not_looked_for_on_the_hub() -> None:
    """`world/features` has the form of a name on the hub."""
    assert "features" in read_card("world/features").parts and read_card("world").role == "teacher"
    name = feature_map("auto", (32, 32), torch.device("cpu")).name
    assert name.startswith("world/features "), name


def test_of_another_model_only_the_denoiser_is_read(tmp_path: Path) -> None:
    """Its text encoder and codec may be larger than all else of a run, and nobody asks them anything."""
    folder = tiny_model(seed=7).save(tmp_path / "images")
    for part in ("text", "codec", "features"):
        (folder / f"{part}.safetensors").unlink()
    source = Pretrained(source=str(folder))
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        source.load()
    alone = source.load(parts=("denoiser",))
    assert set(alone.parts) == set(alone.card.parts) == {"denoiser"}
    method = AVDM2(image_teacher=source, frames=2, adversary=None)
    run = prepare(tiny_model(), method, WorldClips(num_frames=FRAMES), small(1), tmp_path / "run")
    assert fingerprint(run.nets.image_teacher) == fingerprint(tiny_model(seed=7).denoiser)


def test_parts_of_a_fresh_model_do_not_depend_on_who_is_asked_for() -> None:
    networks = {"text": Spec("TextEncoder", {"width": 16, "depth": 1}), "codec": Spec("FrameAutoencoder", {"width": 8})}
    source = Scratch(**networks, seed=3)
    assert fingerprint(source.load(parts=("codec",)).codec) == fingerprint(source.load().codec)


def flipped(path: Path, place: float = 0.5) -> None:
    """One bit of the file changes."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_one_changed_byte_is_noticed_unless_trusted(tmp_path: Path) -> None:
    folder = model().save(tmp_path)
    flipped(folder / "codec.safetensors", 0.9)
    with pytest.raises(RecipeError, match=r"codec.safetensors is not as it was written.*--trust"):
        VideoModel.from_pretrained(folder)
    assert VideoModel.from_pretrained(folder, trust=True).card == read_card(folder)


def test_what_stays_in_its_file_is_compared_when_it_is_read(tmp_path: Path) -> None:
    folder = model().save(tmp_path)
    flipped(folder / "codec.safetensors", 0.9)
    left = VideoModel.from_pretrained(folder, leave=("codec",))
    with pytest.raises(RecipeError, match="not as it was written"):
        dict(left.weights("codec"))


def test_a_stamp_reads_every_byte_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.core.stamp.BLOCK", 4)
    file, seen = tmp_path / "file", set()
    for content in (b"", b"abcd", b"abcdefgh", b"efghabcd", b"abcdefgi", b"abcdefghi"):
        file.write_bytes(content)
        seen.add(stamp_of(file))
        assert stamp_of(file) == stamp_of(file) and stamp_of(file).startswith(f"{len(content)} ")
    assert len(seen) == 6


def test_the_built_in_world_is_as_it_was_shipped() -> None:
    for name in ("world", "world/features"):
        card = read_card(name)
        assert card.files.keys() == card.parts.keys()
        VideoModel.from_pretrained(name)


@pytest.mark.parametrize("field", ["parts", "sources", "files"])
def test_names_of_parts_lead_nowhere_else(tmp_path: Path, field: str) -> None:
    folder = model().save(tmp_path / "model")
    card = json.loads((folder / "card.json").read_text())
    card[field]["../text"] = card["parts"]["text"] if field == "parts" else "x"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(RecipeError, match=f"{field}: '../text' is no part of a video model"):
        read_card(folder)


def test_a_part_put_in_later_leads_nowhere_either(tmp_path: Path) -> None:
    mine = model()
    mine.parts["../text"] = mine.parts["text"]
    with pytest.raises(ValueError, match=r"'../text' is no part"):
        mine.save(tmp_path / "out")
    assert not (tmp_path / "text.safetensors").exists()
