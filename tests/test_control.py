"""Control of a live stream: events reach the first chunk that is not begun, frame by frame, and survive a restore."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import Facing
from fewstep.compress import FrameInput
from fewstep.diffusion import Stream
from fewstep.models import VideoModel
from fewstep.models.snapshots import load_snapshot, save_snapshot
from fewstep.streaming import LiveChunk, LiveSession, Session
from fewstep.streaming.control import Control, held_last, lasting, of_latents, told
from support_engine import shaken
from test_live import begin, joined, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
LEFT, RIGHT, NONE = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


@pytest.fixture
def model() -> VideoModel:
    """The tiny model in chunks of two frames at 4 frames a second, which reads two keys."""
    made = streaming_model().transformed(FrameInput(name="keys", width=2, words=("left", "right"), default=0.0))
    shaken(made.denoiser.backbone.signals, 0.1)
    return made


def live(model: VideoModel) -> LiveSession:
    return LiveSession(Session(model, ("a red ball", "a blue star")), beside=False)


def keys(chunks: list[LiveChunk]) -> list[Any]:
    return torch.cat([chunk.told["keys"] for chunk in chunks], 1)[0].tolist()


def test_a_control_reaches_the_first_chunk_that_is_not_begun(model: VideoModel) -> None:
    session = live(model)
    assert session.control("keys", LEFT) == 0
    shown = begin(session, 1)  # chunk 1 has made a call
    assert session.control("keys", RIGHT) == 2
    assert session.control("keys", NONE, chunk=0) == 2  # the last one for a chunk counts
    assert session.control("keys", RIGHT, at=1.1) == 3  # chunks start at 0, 0.5, 1 and 1.5 s
    shown += session.frames(5 - len(shown))
    assert [chunk.index for chunk in shown] == [0, 1, 2, 3, 4]
    assert keys(shown) == [LEFT] * 4 + [NONE] * 2 + [RIGHT] * 4


def test_what_is_told_is_what_the_network_reads(model: VideoModel) -> None:
    """Bit for bit the session that is given the extras of every chunk, and another stream without them."""
    rows = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    with live(model) as one:
        assert one.control("keys", rows) == 0
        frames = joined(list(one.frames(3)))
    session, made, past = Session(model, ("a red ball", "a blue star")), [], None
    for chunk in range(3):
        *_, last = session.steps(extra={"keys": rows[2 * chunk : 2 * chunk + 2].expand(2, -1, -1)})
        decoded = model.decode_next(last.x, past, last=False)
        made, past = [*made, decoded.frames], decoded.past
    expected = torch.cat(made, 2).movedim(1, -1)
    assert (frames.float() / 127.5 - 1 - expected).abs().max() < 1 / 127
    with live(model) as silent:
        assert not torch.equal(joined(list(silent.frames(3))), frames)


def test_each_clip_may_have_its_own(model: VideoModel) -> None:
    with live(model) as session:
        session.control("keys", torch.tensor([[LEFT], [RIGHT]]))
        (chunk,) = session.frames(1)
    assert chunk.told["keys"].tolist() == [[LEFT, LEFT], [RIGHT, RIGHT]]


def test_later_controls_never_change_a_chunk_and_a_restored_stream_goes_on(model: VideoModel) -> None:
    with live(model) as one:
        one.control("keys", [LEFT, LEFT, RIGHT, NONE])
        one.control("keys", RIGHT, chunk=4)
        whole = list(one.frames(6))
    with live(model) as session:
        session.control("keys", [LEFT, LEFT, RIGHT, NONE])
        first = list(session.frames(2))
        session.control("keys", RIGHT, chunk=4)
        where = session.snapshot()
        session.control("keys", LEFT)  # somebody goes on otherwise
        other = list(session.frames(1))
    assert torch.equal(joined(first), joined(whole[:2])) and not torch.equal(joined(other), joined(whole[2:3]))
    with LiveSession.restore(model, where, beside=False) as again:
        assert torch.equal(joined(list(again.frames(4))), joined(whole[2:]))


def test_a_cancelled_chunk_is_told_anew(model: VideoModel) -> None:
    session = live(model)
    session.control("keys", LEFT)
    shown = begin(session, 1)
    session.cancel()
    assert session.control("keys", RIGHT) == 1
    session.resume()
    shown += session.frames(2 - len(shown))
    assert keys(shown) == [LEFT] * 2 + [RIGHT] * 2


def control(name: str, chunk: int, *rows: float) -> Control:
    return Control(name, torch.tensor(rows, dtype=torch.float32)[None, :, None], chunk, 4 * chunk)


def test_rows_follow_the_frames_that_are_seen() -> None:
    """Latent frames of four frames each: the third one is half of the old rows and half of the last one, which stays."""
    some = [control("beat", 0, 1, 1, 1, 0, 0.5, 0.5, 0.5), control("keys", 2, 1)]
    inputs = {name: FrameInput(name=name) for name in ("beat", "keys")}
    found = told(some, (0, 4), inputs)
    assert list(found) == ["beat"] and found["beat"].flatten().tolist() == [0.75]
    assert told(some, (4, 8, 12), inputs)["beat"].flatten().tolist() == [0.5, 0.5]
    assert set(told(some, (8, 12), inputs)) == {"beat", "keys"}
    assert told([*some, control("beat", 1, 0.0)], (4, 8), inputs)["beat"].flatten().tolist() == [0.0]


def test_a_latent_frame_is_told_of_frames_before_and_after_it() -> None:
    """Closed form, one frame per latent frame: the row before, its own, and the two after; the outermost rows stay."""
    numbers = torch.arange(1.0, 6.0)[None, :, None]
    windows = of_latents(numbers, range(6), back=1, ahead=2)
    assert windows[0].tolist() == [[1, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 5], [4, 5, 5, 5]]
    four = of_latents(numbers, (0, 1, 5), back=1)  # of one frame, then of four: the mean of the four, one frame earlier
    assert four[0].tolist() == [[1, 1], [2.5, 3.5]]
    heard = {"beat": FrameInput(name="beat", back=1, ahead=2)}
    whole = [Control("beat", numbers, 0, 0)]
    parts = [told(whole, ends, heard)["beat"] for ends in ((0, 1, 2), (2, 3, 4, 5))]
    assert torch.equal(torch.cat(parts, 1), windows)
    later = told([*whole, Control("beat", torch.zeros(1, 1, 1), 1, 3)], (2, 3), heard)
    assert later.popitem()[1].tolist() == [[[2, 3, 0, 0]]]  # a control that is to come is heard, as far as it is near


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_chunk_never_hears_beyond_its_look_ahead(ahead: int) -> None:
    """Sound that comes later than its last frame and the look-ahead does not change a chunk; the last that it hears does."""
    heard = FrameInput(name="beat", back=1, ahead=ahead, default=0.0)
    model = streaming_model().transformed(heard)
    shaken(model.denoiser.backbone.signals, 0.3)
    beat, shown = torch.rand(12, 1, generator=torch.Generator().manual_seed(0)), {}
    for changed in (None, 4 + ahead - 1, 4 + ahead):  # the second chunk ends before frame 4
        rows = beat.clone()
        if changed is not None:
            rows[changed] += 0.5
        with live(model) as session:
            session.control("beat", rows)
            shown[changed] = joined(list(session.frames(2)))
    assert not torch.equal(shown[4 + ahead - 1], shown[None]) and torch.equal(shown[4 + ahead], shown[None])


def test_what_was_heard_before_a_restore_counts(model: VideoModel) -> None:
    """A control that another one has replaced is kept as long as its frames are heard."""
    listening = streaming_model().transformed(FrameInput(name="beat", back=2, default=0.0))
    shaken(listening.denoiser.backbone.signals, 0.3)
    with live(listening) as one:
        one.control("beat", [1.0])
        one.control("beat", [0.0], chunk=1)
        first = list(one.frames(1))
        one.control("beat", [0.5], chunk=3)
        where, rest = one.snapshot(), list(one.frames(3))
    assert rest[0].told["beat"].tolist() == [[[1, 1, 0], [1, 0, 0]]] * 2 and len(first) == 1
    with LiveSession.restore(listening, where, beside=False) as again:
        assert torch.equal(joined(list(again.frames(3))), joined(rest))


def test_only_what_may_still_be_told_is_kept() -> None:
    some = [control("a", 0, 1), control("b", 0, 1), control("a", 2, 1), control("a", 5, 1)]
    assert [(c.name, c.chunk) for c in lasting(some, 12)] == [("b", 0), ("a", 2), ("a", 5)]
    assert lasting(some, 7) == tuple(some) and len(lasting(some, 8)) == 3


@pytest.mark.parametrize(
    ("name", "numbers", "options", "why"),
    [
        ("wheel", LEFT, {}, r"does not read 'wheel'; what it reads of every frame: keys"),
        ("keys", [1.0], {}, r"give 2 numbers for one frame.*got \[1\]"),
        ("keys", torch.zeros(3, 4, 2), {}, r"each of 2 clips; got \[3, 4, 2\]"),
        ("keys", torch.zeros(0, 2), {}, r"got \[0, 2\]"),
        ("keys", [float("nan"), 0], {}, "must be finite"),
        ("keys", LEFT, {"at": 1.0, "chunk": 1}, "not both"),
        ("keys", LEFT, {"at": -1.0}, "from second 0 or chunk 0 on"),
    ],
)
def test_what_the_model_does_not_read_is_refused(
    model: VideoModel, name: str, numbers: Any, options: dict[str, Any], why: str
) -> None:
    with live(model) as session, pytest.raises(ValueError, match=why):
        session.control(name, numbers, **options)


def test_the_keys_of_a_chunk_are_those_of_its_last_frame() -> None:
    """Of four frames per latent frame, held in two or more; frames that were heard before do not count."""
    keys = FrameInput(name="keys", width=2, words=("left", "right"), back=1, ahead=1)
    card = replace(streaming_model().card, transforms=(keys,))
    rows = torch.tensor([[[1, 1, 1, 1, 1, 1], [0, 1, 0.5, 0.25, 0, 1]]])
    assert held_last(card, {"keys": rows}) == ("left",) and held_last(card, {}) == ()
    unnamed = replace(card, transforms=(replace(keys, words=()),))
    assert held_last(unnamed, {"keys": rows}) == ()


def test_a_memory_that_faces_is_told_poses() -> None:
    plain = streaming_model()
    with live(plain) as session, pytest.raises(ValueError, match="nothing"):
        session.control("pose", torch.zeros(6))
    stream = Stream(chunks=(2,), memory=Facing(frames=2, recent=2, sink=0))
    facing = plain.with_card(contract=replace(plain.card.contract, stream=stream))
    with LiveSession(Session(facing, ("a red ball",)), beside=False) as session:
        session.control("pose", [0.0, 0, 0, 1, 0, 0])
        shown = list(session.frames(4))
    assert all(chunk.told["pose"].shape == (1, 2, 6) for chunk in shown)


def test_a_memory_that_would_not_be_told_is_not_made_anew(model: VideoModel) -> None:
    with live(model) as session:
        with pytest.raises(ValueError, match="reads keys of every frame.*keep, clear or lerp"):
            session.prompt("a green cross turns", how="recache")
        assert session.prompt("a green cross turns", how="lerp") == 0


def test_a_latent_frame_needs_all_its_frames() -> None:
    numbers: Tensor = torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match="4 frames need"):
        of_latents(numbers, (8, 12))


# --- a signal that is fed as it comes -----------------------------------------------------------------------------------------


def listening(ahead: int, back: int = 1) -> VideoModel:
    made = streaming_model().transformed(FrameInput(name="beat", back=back, ahead=ahead, default=0.0))
    shaken(made.denoiser.backbone.signals, 0.3)
    return made


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_fed_stream_waits_for_what_a_chunk_hears_and_no_longer(ahead: int) -> None:
    """Chunks of two frames: chunk n begins when 2 (n + 1) + ahead rows are there. Fed row by row it is the stream that is told
    all at once, bit for bit."""
    model, beat = listening(ahead), torch.rand(12, 1, generator=torch.Generator().manual_seed(0))
    with live(model) as whole:
        whole.control("beat", beat)
        expected = joined(list(whole.frames(4)))
    with live(model) as session:
        shown, counts = [], []
        for row in range(8 + ahead):
            assert session.feed("beat", beat[row : row + 1]) == row + 1
            shown += session.frames()  # without end: it ends where a row is missing
            counts.append(len(shown))
        assert counts == [max(row + 1 - ahead, 0) // 2 for row in range(8 + ahead)]
        assert session.waiting and torch.equal(joined(shown), expected)


def test_after_the_last_rows_the_last_one_stays() -> None:
    model, rows = listening(2), torch.tensor([[0.1], [0.9], [0.4]])
    with live(model) as told_at_once, live(model) as session:
        told_at_once.control("beat", rows)
        session.feed("beat", rows[:1])
        assert list(session.frames(1)) == [] and session.waiting
        assert session.feed("beat", rows[1:], last=True) == 3 and not session.waiting
        assert torch.equal(joined(list(session.frames(4))), joined(list(told_at_once.frames(4))))


def test_a_restored_stream_waits_likewise(tmp_path: Path) -> None:
    model = listening(1)
    model = model.with_card(role="student")
    beat = torch.rand(10, 1, generator=torch.Generator().manual_seed(1))
    with live(model) as session:
        session.feed("beat", beat[:6])
        first = list(session.frames())
        where = session.snapshot()
        session.feed("beat", beat[6:])
        rest = list(session.frames())
    assert (len(first), len(rest)) == (2, 2)
    save_snapshot(where, model, tmp_path / "there.safetensors")
    with LiveSession.restore(model, load_snapshot(tmp_path / "there.safetensors", model), beside=False) as again:
        assert list(again.frames()) == [] and again.feed("beat", beat[6:]) == 10
        assert torch.equal(joined(list(again.frames())), joined(rest))


def test_what_is_fed_is_checked() -> None:
    with live(listening(0)) as session:
        with pytest.raises(ValueError, match="does not read 'keys'"):
            session.feed("keys", [[1.0]])
        with pytest.raises(ValueError, match="must be finite"):
            session.feed("beat", [[float("nan")]])
