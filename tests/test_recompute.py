"""Memories that are made anew before every chunk: what a chunk reads, when it is the plain stream, and what a switch costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.attention import BlockCausal, Window
from fewstep.core import Call, Seeds
from fewstep.diffusion import CFG, FreeNoise, Stream
from fewstep.methods import StreamingLong
from fewstep.models.repattern import repattern
from fewstep.streaming import Session
from fewstep.streaming.blocks import one_after_the_other
from test_plans import OTHERS, clip, committed, double, stepped
from test_streaming import PROMPTS, made, streaming_model

SEEDS = Seeds((0, 1))


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "stream",
    [Stream(window=4), Stream(chunks=(1, 2), window=5), Stream(window=4, commit="noised", context_time=0.2)],
    ids=["frames", "uneven", "noised"],
)
def test_while_the_past_fits_the_window_it_is_the_plain_stream(stream: Stream, guidance: CFG) -> None:
    """Bit for bit, and no longer: then the memory that is carried on knows of frames that have left."""
    plain = made(Session(stepped(stream, guidance=guidance), PROMPTS), 6)
    anew = made(Session(stepped(replace(stream, recompute=True), guidance=guidance), PROMPTS), 6)
    fits = sum(stream.begin(index) <= stream.window - max(stream.chunks) for index in range(6))
    assert fits in (3, 4)
    assert [torch.equal(a, b) for a, b in zip(plain, anew, strict=True)] == [True] * fits + [False] * (6 - fits)
    assert (plain[5] - anew[5]).abs().max() > 1e-6


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_chunk_reads_one_forward_over_the_last_latents(chunk: int) -> None:
    """As many as the window has room for beside its own; whatever was remembered before does not matter."""
    room = 2 * chunk
    model, loop = double(Stream(chunks=(chunk,), window=3 * chunk, recompute=True))
    old, new = (model.conditions(prompts)[0] for prompts in (PROMPTS, OTHERS))
    latents, x = clip(4 * chunk), clip(chunk, seed=4)
    seen = loop.recent(latents[:, :, :-chunk], latents[:, :, -chunk:], 3)
    assert torch.equal(seen, latents[:, :, -room:])
    t = torch.full((2, chunk), 0.7).double()
    masked = repattern(model.denoiser, BlockCausal(chunk=chunk))
    times = torch.cat([torch.zeros(2, room).double(), t], 1)
    whole = masked(torch.cat([latents[:, :, -room:], x], 2), times, new).x0[:, :, -chunk:]
    for before in (committed(model, loop, latents, old), replace(loop.begin(), start=torch.tensor(4 * chunk))):
        memory = loop.ready(before, seen, new, new, SEEDS)
        assert sorted(memory.positions.tolist()) == list(range(2 * chunk, 4 * chunk)) and memory.start == 4 * chunk
        read = model.denoiser(x, t, new, Call(kv=model.denoiser.recall(memory, x))).x0
        torch.testing.assert_close(read, whole, atol=1e-10, rtol=0)


def test_a_switch_needs_no_recache() -> None:
    """The next chunk is what a plain stream makes after one; and recache is refused, because it would change nothing."""
    stream = Stream(window=5)
    plain, anew = (Session(streaming_model(replace(stream, recompute=r)), PROMPTS) for r in (False, True))
    for session in (plain, anew):
        made(session, 3)
    before = plain.snapshot
    plain.steer(OTHERS, "recache")
    anew.steer(OTHERS, "keep")
    wanted = made(plain, 1)[0]
    assert torch.equal(made(anew, 1)[0], wanted)
    carried = Session(plain.model, before)
    carried.steer(OTHERS, "keep")
    assert (made(carried, 1)[0] - wanted).abs().max() > 1e-6
    with pytest.raises(ValueError, match="anew before every chunk, with the new prompts; choose keep"):
        anew.steer(PROMPTS, "recache")


def test_a_hard_cut_forgets_the_latents() -> None:
    """The next chunk reads nothing, as the first one of a stream; then the latents since the cut are read."""
    stream = Stream(window=5, positions="window")
    plain, anew = (Session(streaming_model(replace(stream, recompute=r)), PROMPTS) for r in (False, True))
    for session in (plain, anew):
        made(session, 2)
        session.steer(OTHERS, "clear")
    for _ in range(3):
        a, b = made(plain, 1)[0], made(anew, 1)[0]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_snapshot_holds_latents_and_no_keys() -> None:
    session = Session(streaming_model(Stream(window=3, recompute=True)), PROMPTS)
    made(session, 4)
    kept = session.snapshot
    assert kept.memory.nbytes == 0 and kept.memory.start == 4
    assert kept.latents is not None and kept.latents.shape[2] == 2
    wanted = torch.cat(made(session, 2), 2)
    assert torch.equal(torch.cat(made(Session(session.model, kept), 2), 2), wanted)


def test_latents_that_are_given_are_read_as_if_they_were_made() -> None:
    stream, given = Stream(window=4), clip(1).float()
    sessions = [Session(streaming_model(replace(stream, recompute=r)), PROMPTS) for r in (False, True)]
    for session in sessions:
        session.begin_with(given)
    assert torch.equal(*(torch.cat(made(session, 3), 2) for session in sessions))


@pytest.mark.parametrize(
    ("stream", "calls"),
    [(Stream(window=3), 1), (Stream(window=3, recompute=True), 2), (Stream(chunks=(2,), window=4, recompute=True), 1),
     (Stream(chunks=(2,), window=3, recompute=True), 1)],
    ids=["plain", "frames", "chunks", "part of a chunk"],
)  # fmt: skip
def test_the_calls_to_remember_are_counted(stream: Stream, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heard = streaming_model(stream), list[int]()
    session = Session(model, PROMPTS)
    made(session, 4)
    model.denoiser.register_forward_hook(lambda *_: heard.append(1))
    made(session, 1)
    assert len(heard) - 2 == calls == stream.commits


@pytest.mark.parametrize("window", [3, 4])
def test_the_first_latent_of_the_past_is_that_of_an_image(window: int) -> None:
    """Closed form with a codec that knows no time: `encode(decode(latent))` in place of the first latent, as soon as that is not
    the stream's first; the others stay, and so do the chunks before."""
    stream = Stream(window=window, recompute=True)
    model, bare = (streaming_model(replace(stream, reencode=again)) for again in (True, False))
    session, plain = Session(model, PROMPTS), Session(bare, PROMPTS)
    fits = [torch.equal(a, b) for a, b in zip(made(session, 6), made(plain, 6), strict=True)]
    assert fits == [True] * window + [False] * (6 - window)
    latents = session.snapshot.latents
    assert latents is not None and latents.shape[2] == window - 1
    image = model.codec.encode(model.decode(latents[:, :, :1]))
    loop, (cond, uncond) = session._chunks, model.conditions(PROMPTS)
    anew = torch.cat([image, latents[:, :, 1:]], 2)
    memory = Session(bare, PROMPTS)._chunks.ready(session.snapshot.memory, anew, cond, uncond, SEEDS)
    noise = SEEDS.fold("chunk/6")
    with torch.no_grad():
        *_, last = loop.chunk(memory, noise.randn((2, 4, 1, 8, 8), "start"), cond, uncond, noise)
    torch.testing.assert_close(made(session, 1)[0], last.x, atol=1e-5, rtol=1e-5)


def test_a_rollout_has_no_autoencoder() -> None:
    model = streaming_model(Stream(window=3, recompute=True, reencode=True))
    loop = Session(model, PROMPTS)._chunks
    cond = model.conditions(PROMPTS)[0]
    with pytest.raises(ValueError, match="no autoencoder; train with reencode: false"):
        loop.ready(replace(loop.begin(), start=torch.tensor(4)), clip(2).float(), cond, cond, SEEDS)
    with pytest.raises(ValueError, match="set recompute: true, or reencode: false"):
        Stream(window=3, reencode=True)


def test_a_codec_that_shows_frames_late_is_refused() -> None:
    model = streaming_model(Stream(window=3, recompute=True, reencode=True))
    late = model.codec.decode_next
    model.codec.decode_next = lambda x, past=None, *, last=False: late(x[:, :, 1:], past, last=last)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="decodes that frame only after later latents"):
        made(Session(model, PROMPTS), 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "give window"),
        ({"window": 4, "sink": 1}, "a window and no sink"),
        ({"memory": Window(window=4)}, "leave sink and memory out"),
        ({"window": 4, "rolling": 1}, "leave rolling out"),
        ({"window": 4, "commit": "last"}, "let commit be clean or noised"),
    ],
)
def test_what_cannot_be_made_anew_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Stream(recompute=True, **wrong)


def test_where_chunks_are_one_call_or_a_memory_is_carried_it_is_refused() -> None:
    stream = Stream(window=4, recompute=True, noise=FreeNoise())
    with pytest.raises(ValueError, match="recompute: false"):
        one_after_the_other(stream, (1, 1))
    with pytest.raises(ValueError, match="carries its memory on"):
        StreamingLong(stream=stream)


def test_inputs_of_every_frame_are_refused() -> None:
    model, loop = double(Stream(window=4, recompute=True))
    cond = model.conditions(PROMPTS)[0]
    told = replace(cond, extra={"actions": torch.zeros(2, 1, 3)}, framewise=frozenset({"actions"}))
    with pytest.raises(ValueError, match="actions of every frame"):
        loop.ready(loop.begin(), clip(1), told, told, SEEDS)
