"""`fewstep stream --keys`: keys from words or a file, frame by frame, for a student that reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.cli.command import UsageError
from fewstep.cli.keys import read_keys
from fewstep.compress import FrameInput
from fewstep.data.growing import GrowingVideo
from fewstep.data.video import read_note, read_video
from fewstep.models import Card, VideoModel
from support_engine import shaken
from test_live import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
LEFT, RIGHT, NONE, BOTH = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]
KEYS = FrameInput(name="keys", width=2, words=("left", "right"), default=0.0)


@pytest.fixture
def card() -> Card:
    return replace(streaming_model().card, transforms=(KEYS,), fps=4.0)


def test_words_are_frames(card: Card) -> None:
    """After the last key nothing is held, unless it has no number."""
    assert read_keys("left*2 none right*1", card).tolist() == [LEFT, LEFT, NONE, RIGHT, NONE]
    assert read_keys("left+right*2 right", card).tolist() == [BOTH, BOTH, RIGHT]


def test_a_file_has_the_second_of_each_change(card: Card, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("0.5 left\n\n1.1 left+right\n1.5 none\n")
    assert read_keys(str(file), card).tolist() == [NONE] * 2 + [LEFT] * 2 + [BOTH] * 2 + [NONE]
    for text, why in (
        ("1 left\n0.5 right\n", "line 2 is before"), ("left\n", "line 1 is 'left'"), ("soon left\n", "its second and keys"),
        ("nan left\n", "line 1 is before"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UsageError, match=why):
            read_keys(str(file), card)
    with pytest.raises(UsageError, match="No such file"):
        read_keys("nowhere.txt", card)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("jump*3", "unknown key jump; the keys are left, right and none"),
        ("left*0", "cannot read"),
        ("left*x", "cannot read"),
    ],
)
def test_what_is_no_key_is_refused(text: str, why: str, card: Card) -> None:
    with pytest.raises(UsageError, match=why):
        read_keys(text, card)


def test_a_model_without_keys_is_refused(card: Card) -> None:
    for other in ((), (replace(KEYS, name="beat"),), (replace(KEYS, words=()),)):
        with pytest.raises(UsageError, match="reads no keys.*world/actions"):
            read_keys("left", replace(card, transforms=other))


def test_a_video_obeys_its_keys_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the frames of a session that is told the same, and its note the keys."""
    monkeypatch.chdir(tmp_path)
    model = streaming_model().transformed(KEYS)
    shaken(model.denoiser.backbone.signals, 0.5)
    model.with_card(role="student", fps=4).save("student")
    words = ["stream", "student", "--prompt", "a red ball", "--seconds", "1.5", "--quiet", "--scale", "1"]
    assert main([*words, "--keys", "left*3 right", "--output", "keys.mp4"]) == 0
    there = read_video("keys.mp4", 6)
    for keys, same in (([LEFT, LEFT, LEFT, RIGHT], True), ([NONE], False)):
        with VideoModel.from_pretrained("student").stream(["a red ball"]) as live, GrowingVideo("b.mp4", fps=4) as file:
            assert live.control("keys", torch.tensor(keys)) == 0
            for chunk in live.frames(3):
                file.add(chunk.frames[0])
        assert torch.equal(read_video("b.mp4", 6), there) == same
    assert json.loads(read_note("keys.mp4"))["options"]["keys"] == "left*3 right"
    assert main(["stream", "--like", "keys.mp4", "--output", "again.mp4", "--quiet"]) == 0
    assert torch.equal(read_video("again.mp4", 6), there)
    assert main([*words, "--keys", "jump", "--output", "no.mp4"]) == 2 and not Path("no.mp4").exists()
