"""A stream that begins with an image: its latent is the first chunk, later chunks read it, and the video shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.cli import main
from fewstep.core import Call, Rng, Seeds
from fewstep.core.pixels import to_uint8
from fewstep.data.growing import GrowingVideo
from fewstep.data.video import read_image, read_video, write_video
from fewstep.diffusion import CFG, Stream
from fewstep.models import VideoModel
from fewstep.models.snapshots import load_snapshot, save_snapshot
from fewstep.streaming import LiveSession, Session, Video
from support_engine import tiny_model
from test_live import PROMPTS, joined, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
STREAM = Stream(chunks=(1, 2), window=5, sink=1)


def model_of(stream: Stream = STREAM, guidance: CFG = CFG()) -> VideoModel:
    """The tiny model in two steps, whose frames read each other within a chunk."""
    contract = replace(streaming_model().card.contract, stream=stream, guidance=guidance)
    return tiny_model().with_card(contract=contract, fps=4)


@pytest.fixture
def model() -> VideoModel:
    return model_of()


def picture(seed: int = 0, count: int = 1) -> Tensor:
    return Rng(seed).rand((count, 3, 32, 32), "picture") * 2 - 1


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("commit", ["clean", "noised", "last"])
def test_the_first_chunk_is_the_image_and_later_ones_read_it(commit: str, guidance: CFG) -> None:
    """Bit for bit its latent; the chunk after it reads the keys and values of a clean call on it, at time 0."""
    stream = replace(STREAM, commit=commit, context_time=0.1 if commit == "noised" else 0.0)  # type: ignore[arg-type]
    model = model_of(stream, guidance)
    with model.stream(PROMPTS, image=picture()[0]) as live:
        session = live._session
        first, second = session.take(2)
    latent = model.codec.encode(picture()[:, :, None])
    assert torch.equal(first, latent.expand(2, -1, -1, -1, -1)) and second.shape[2] == 2
    with model.stream(PROMPTS, image=picture(1)) as live:
        other = list(live._session.take(2))[1]
    assert not torch.equal(second, other)
    if commit == "noised":
        return
    loop, (cond, uncond) = session._chunks, model.conditions(PROMPTS)
    view = model.denoiser.recall(loop.begin(), first)
    with torch.no_grad():
        kv = guidance(model.denoiser, first, torch.zeros(2), cond, uncond, Call(kv=view)).kv
        noise = Seeds((0, 1)).fold("chunk/1")
        start = noise.randn(second.shape, "start")
        *_, last = loop.chunk(loop.begin().commit(kv or (), 1), start, cond, uncond, noise)
    torch.testing.assert_close(last.x, second, rtol=1e-5, atol=1e-5)


def test_the_video_shows_the_image_and_goes_on_after_a_restore(model: VideoModel) -> None:
    with model.stream(PROMPTS, image=picture(count=2)) as live:
        before = live.snapshot()
        whole = list(live.frames(4))
    shown = model.decode(model.codec.encode(picture(count=2)[:, :, None]))
    assert [chunk.frames.shape[1] for chunk in whole] == [1, 2, 2, 2]
    assert torch.equal(whole[0].frames, to_uint8(shown).movedim(1, -1))
    with LiveSession.restore(model, before, beside=False) as again:
        assert torch.equal(joined(list(again.frames(2))), joined(whole[:2]))
        where = again.snapshot()
    with LiveSession.restore(model, where, beside=False) as again:
        assert torch.equal(joined(list(again.frames(2))), joined(whole[2:]))


def test_an_image_takes_one_call_and_a_cancelled_one_leaves_no_trace(model: VideoModel) -> None:
    times = list[float]()
    model.denoiser.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1].max())))
    session = Session(model, PROMPTS)
    session.begin_with(torch.zeros(2, 4, 1, 8, 8))
    before, steps = session.snapshot, session.steps()
    assert next(steps).index == 0 and times == [0.0]
    steps.close()  # type: ignore[attr-defined]
    assert session.snapshot is before and session.snapshot.memory.layers == ()
    list(session.take(2))
    assert times == [0.0, 0.0, 1.0, 0.5, 0.0]


def test_several_chunks_may_be_given(model: VideoModel) -> None:
    given = Rng(0).randn((2, 4, 5, 8, 8), "given")
    session = Session(model, PROMPTS)
    session.begin_with(given)
    chunks = list(session.take(4))
    assert torch.equal(torch.cat(chunks[:3], 2), given) and chunks[3].shape[2] == 2


def test_a_later_stretch_may_begin_with_an_image() -> None:
    """A stream of single frames goes on with a picture in the middle: it is shown, the next chunks read it, and only it if the
    memory was cleared: then they are those of a stream that begins so, at the same place."""
    model = model_of(Stream(window=3, positions="window"))
    latent = model.codec.encode(picture(count=2)[:, :, None])
    session = Session(model, PROMPTS)
    list(session.take(2))
    kept = session.snapshot
    session.begin_with(latent)
    shown, kept_on = session.take(2)
    assert torch.equal(shown, latent) and session.snapshot.chunks == 4
    plain = list(Session(model, kept).take(2))
    assert not torch.equal(plain[1], kept_on)
    session = Session(model, kept)
    session.steer(PROMPTS, "clear")
    session.begin_with(latent)
    cut = list(session.take(2))[1]
    loop, (cond, uncond) = session._chunks, model.conditions(PROMPTS)
    with torch.no_grad():
        empty = replace(loop.begin(), start=torch.tensor(2))
        kv = model.denoiser(latent, torch.zeros(2), cond, Call(kv=model.denoiser.recall(empty, latent))).kv
        noise = Seeds((0, 1)).fold("chunk/3")
        *_, last = loop.chunk(empty.commit(kv or (), 1), noise.randn(cut.shape, "start"), cond, uncond, noise)
    torch.testing.assert_close(last.x, cut, rtol=1e-5, atol=1e-5)


def test_a_live_stream_goes_on_with_an_image_and_after_a_restore_likewise(tmp_path: Path) -> None:
    model = model_of(Stream(window=3)).with_card(role="student")
    latent = model.codec.encode(picture(count=2)[:, :, None])
    with model.stream(PROMPTS) as live:
        assert live.begin_with(latent, at=1.0) == 4  # a chunk is a frame, and there are four a second
        list(live.frames(2))
        where = live.snapshot()
        assert [chunk for chunk, _ in where.given] == [4]
        rest = list(live.frames(4))
        assert live.begin_with(latent, chunk=1) == 6 and live.snapshot().given[0][0] == 6
        with pytest.raises(ValueError, match=r"and \(2, 4, 1, 2, 2\) were given"):
            live.begin_with(latent[..., :2, :2])
    shown = model.decode(latent)
    assert torch.equal(rest[2].frames, to_uint8(shown).movedim(1, -1))
    save_snapshot(where, model, tmp_path / "there.safetensors")
    for start in (where, load_snapshot(tmp_path / "there.safetensors", model)):
        with LiveSession.restore(model, start, beside=False) as again:
            assert torch.equal(joined(list(again.frames(4))), joined(rest))


def test_what_cannot_begin_with_an_image_is_refused(model: VideoModel) -> None:
    long = model_of(Stream(chunks=(2,)))
    with pytest.raises(ValueError, match=r"first chunk of 2 latent frames.*chunks \[1, 2\]"):
        long.stream(PROMPTS, image=picture())
    with pytest.raises(
        ValueError, match=r"begins with an image: give image \(--image\), \[3, 32, 32\]; got \[1, 3, 8, 8\]"
    ):
        model.stream(PROMPTS, image=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="3 images for 2 clips"):
        model.stream(PROMPTS, image=picture(count=3))
    with pytest.raises(ValueError, match="changes no video begins with an image"):
        model.stream(PROMPTS, image=picture(), video=Video(lambda chunk: torch.zeros(())))
    with pytest.raises(ValueError, match=r"begins with latents \(2, 4, 1, 8, 8\), and \(1, 4, 1, 8, 8\) were given"):
        Session(model, PROMPTS).begin_with(torch.zeros(1, 4, 1, 8, 8))
    with pytest.raises(ValueError, match=r"make clips of 1 or 3, not 2"):
        Session(model, PROMPTS).begin_with(torch.zeros(2, 4, 2, 8, 8))
    session = Session(model, PROMPTS)
    list(session.take(1))
    with pytest.raises(ValueError, match=r"make clips of 0 or 2, not 1"):
        session.begin_with(torch.zeros(2, 4, 1, 8, 8))
    steps = session.steps()
    next(steps)
    with pytest.raises(ValueError, match="a chunk is being made"):
        session.begin_with(torch.zeros(2, 4, 2, 8, 8))


def test_the_command_takes_a_picture(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model.with_card(role="student").save("student")
    write_video(Path("a.png"), picture()[0][:, None], scale=2)
    words = ["stream", "student", "--prompt", "a red ball", "--quiet", "--scale", "1", "--image", "a.png"]
    assert main([*words, "--seconds", "1.25", "--output", "a.mp4"]) == 0
    loaded = VideoModel.from_pretrained("student")
    with (
        loaded.stream(["a red ball"], image=read_image("a.png", (32, 32))) as live,
        GrowingVideo("b.mp4", fps=4) as file,
    ):
        for chunk in live.frames(3):
            file.add(chunk.frames[0])
    assert torch.equal(read_video("a.mp4", 5), read_video("b.mp4", 5))
    assert main([*words, "--video", "a.mp4"]) == 2 and "leave out one" in capsys.readouterr().err
