"""A rolling window: every chunk sees all times in order, in one call per tick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import BlockCausal, Dense, KVCache, Retrieval
from fewstep.caching import SkipMiddle
from fewstep.core import Call, Cond, KVView, Seeds
from fewstep.core.pixels import to_uint8
from fewstep.diffusion import CFG, Contract, Euler, Exact, Heun, Renoise, Sampler, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.streaming import Chunks, Flying, LiveSession, Rolling, Session, Video
from support_engine import tiny_model
from test_streaming import PROMPTS, made

SHAPE = (4, 8, 8)
THREE = (1.0, 0.7, 0.4, 0.0)


def rolling_model(
    stream: Stream, times: tuple[float, ...], sampler: Sampler = Renoise(), guidance: CFG = CFG()
) -> VideoModel:
    model, steps = tiny_model(), len(times) - 1
    grid = Exact(grids=(times,), otherwise=Shifted())
    if not stream.steps and not stream.rolling:
        stream = replace(stream, rolling=steps)
    contract = Contract(sampler=sampler, steps=len(times) - 1, grid=grid, guidance=guidance, stream=stream)
    return model.with_part("denoiser", repattern(model.denoiser, Dense()), contract=contract)


@dataclass
class Heard:
    """A denoiser that keeps a list of its calls."""

    network: Any
    calls: list[tuple[list[float], int]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)

    @property
    def path(self) -> Any:
        return self.network.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Any:
        times = (t[0] if t.ndim == 2 else t[0].expand(x_t.shape[2])).tolist()
        self.calls.append(([round(time, 3) for time in times], int(call.kv.start) if call.kv else 0))
        return self.network(x_t, t, cond, call)

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        self.read.append(sorted(position for position in memory.positions.tolist() if position >= 0))
        return self.network.recall(memory, x_t, call)


def one_by_one(model: VideoModel) -> VideoModel:
    """The same model, whose stream makes one chunk after the other."""
    contract = model.card.contract
    assert contract.stream is not None
    return model.with_card(contract=replace(contract, stream=replace(contract.stream, rolling=0)))


def rolling(model: VideoModel, network: Any = None) -> Rolling:
    return Rolling(chunks=Chunks.of(network or model.reader, model.card.contract))


def rolled(model: VideoModel, count: int, network: Any = None) -> list[Tensor]:
    window = rolling(model, network)
    with torch.no_grad():
        return list(window.take(count, SHAPE, *model.conditions(PROMPTS), Seeds((0, 1))))


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "stream", [Stream(chunks=(2,)), Stream(window=3, sink=1), Stream(commit="last", window=3), Stream(chunks=(1, 2), window=5)],
    ids=["chunks", "sink", "last", "uneven"],
)  # fmt: skip
def test_with_one_step_it_is_the_ordinary_loop_bit_for_bit(stream: Stream, guidance: CFG) -> None:
    model = rolling_model(stream, (1.0, 0.0), guidance=guidance)
    assert all(torch.equal(a, b) for a, b in zip(rolled(model, 5), made(Session(model, PROMPTS), 5), strict=True))


def test_every_chunk_sees_all_times_in_order() -> None:
    """One call per tick; the window grows at first, and shrinks at the end."""
    model = rolling_model(Stream(chunks=(2,), commit="last"), THREE)
    heard = Heard(model.reader)
    chunks = rolled(model, 4, heard)
    assert len(chunks) == 4 and len(heard.calls) == 4 + 3 - 1
    seen: dict[int, list[float]] = {}
    for times, start in heard.calls:
        for index, time in enumerate(times[::2]):
            assert times[2 * index + 1] == time  # all frames of a chunk
            seen.setdefault(start // 2 + index, []).append(time)
    assert seen == {chunk: [1.0, 0.7, 0.4] for chunk in range(4)}
    assert [len(times) // 2 for times, _ in heard.calls] == [1, 2, 3, 3, 2, 1]


def test_a_finished_chunk_is_remembered_at_its_own_time() -> None:
    model = rolling_model(Stream(), THREE)
    heard = Heard(model.reader)
    rolled(model, 3, heard)
    assert [times for times, _ in heard.calls] == [
        [1.0], [0.7, 1.0], [0.4, 0.7, 1.0], [0.0], [0.4, 0.7], [0.0], [0.4], [0.0],
    ]  # fmt: skip
    assert [start for _, start in heard.calls] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_what_the_last_step_left_is_of_the_finished_chunk() -> None:
    """Keys and values of the first frames of the window's call."""
    model = rolling_model(Stream(commit="last"), (1.0, 0.6, 0.0))
    window, (cond, uncond), rng = (
        Rolling(chunks=Chunks.of(model.reader, model.card.contract)),
        model.conditions(PROMPTS),
        Seeds((0, 1)),
    )
    noise = [rng.fold(f"chunk/{i}").randn((2, 4, 1, 8, 8), "start") for i in range(2)]
    with torch.no_grad():
        first = window.tick(window.chunks.begin(), (Flying(0, noise[0]),), cond, uncond, rng)
        done = window.tick(window.chunks.begin(), (*first.window, Flying(1, noise[1])), cond, uncond, rng)
        x = torch.cat([first.window[0].x, noise[1]], 2)
        view = model.reader.recall(KVCache.empty(), x)
        whole = model.reader(x, torch.tensor([[0.6, 1.0]] * 2), cond, Call(kv=view)).kv
    assert first.memory is None and done.memory is not None and whole is not None
    assert done.memory.positions.tolist() == [0]
    for (k, v), (own_k, own_v) in zip(done.memory.layers, whole, strict=True):
        half = own_k.shape[2] // 2
        assert torch.equal(k, own_k[:, :, :half]) and torch.equal(v, own_v[:, :, :half])


def test_a_window_by_hand() -> None:
    """Three chunks in two steps, written out: in the second call chunk 0 reads chunk 1, which is noise yet."""
    model = rolling_model(Stream(), (1.0, 0.6, 0.0))
    (cond, _), network, rng = model.conditions(PROMPTS), model.reader, Seeds((0, 1))
    own = [rng.fold(f"chunk/{index}") for index in range(3)]
    noise = [seeds.randn((2, 4, 1, 8, 8), "start") for seeds in own]

    def call(x: list[Tensor], times: list[float], memory: KVCache) -> Any:
        view = network.recall(memory, x[0])
        return network(torch.cat(x, 2), torch.tensor([times] * 2), cond, Call(kv=view))

    def again(x0: Tensor, index: int) -> Tensor:
        return network.path.add_noise(x0, own[index].randn(x0.shape, "renoise/0"), torch.full((2,), 0.6))

    with torch.no_grad():
        empty = KVCache.empty()
        zero = again(call([noise[0]], [1.0], empty).x0, 0)
        first = call([zero, noise[1]], [0.6, 1.0], empty).x0
        done = [first[:, :, :1]]
        memory = empty.commit(call(done, [0.0], empty).kv, 1)
        second = call([again(first[:, :, 1:], 1), noise[2]], [0.6, 1.0], memory).x0
        done.append(second[:, :, :1])
        memory = memory.commit(call([done[1]], [0.0], memory).kv, 1)
        done.append(call([again(second[:, :, 1:], 2)], [0.6], memory).x0)
        alone = call([zero], [0.6], empty).x0
    for here, expected in zip(rolled(model, 3), done, strict=True):
        torch.testing.assert_close(here, expected, atol=1e-5, rtol=1e-5)
    assert (alone - done[0]).abs().max() > 1e-4  # a later chunk corrects it


def test_a_deterministic_sampler_rolls_too() -> None:
    """Each chunk takes the sampler's own steps: with one chunk the window is the sampler."""
    for guidance in (CFG(), CFG(scale=2.0)):
        model = rolling_model(Stream(chunks=(3,)), THREE, sampler=Euler(), guidance=guidance)
        (alone,), (chunk,) = rolled(model, 1), made(Session(one_by_one(model), PROMPTS), 1)
        assert torch.equal(alone, chunk)


def test_a_tick_leaves_the_one_before_as_it_was() -> None:
    model = rolling_model(Stream(window=4), THREE)
    window = rolling(model)
    (cond, uncond), rng, memory, flying = model.conditions(PROMPTS), Seeds((0, 1)), window.chunks.begin(), ()
    noise = [rng.fold(f"chunk/{i}").randn((2, 4, 1, 8, 8), "start") for i in range(5)]
    with torch.no_grad():
        for index, x in enumerate(noise[:4]):
            made = window.tick(memory, (*flying, Flying(index, x)), cond, uncond, rng)
            memory, flying = made.memory or memory, made.window
        one, two = (window.tick(memory, (*flying, Flying(4, noise[4])), cond, uncond, rng) for _ in range(2))
        other = window.tick(memory, flying, cond, uncond, rng)
    assert one.memory is not None and torch.equal(one.x, two.x)
    assert other.memory is not None and not torch.equal(one.x, other.x) and len(other.window) == 1
    with pytest.raises(ValueError, match="nothing is in the window"):
        window.tick(memory, (), cond, uncond, rng)


def test_a_call_reads_its_window_and_no_more() -> None:
    """The sink, the newest others, and its own frames are six (Rolling Forcing: 3 + 3 + 15 = 21). So the call that remembers a
    chunk reads more of the past than the one that denoises three, and while the window shrinks, calls read more of it."""
    model = rolling_model(Stream(window=6, sink=1, positions="sink"), THREE)
    heard = Heard(model.reader)
    rolled(model, 8, heard)
    frames = [len(times) for times, _ in heard.calls]
    for own, read, (_, start) in zip(frames, heard.read, heard.calls, strict=True):
        room = 6 - 1 - own
        assert read == sorted({0, *range(max(start - room, 0), start)} if start else set())
    assert frames == [1, 2, 3, 1, *[3, 1] * 5, 2, 1, 1, 1]
    assert max(own + len(read) for own, read in zip(frames, heard.read, strict=True)) == 6


def test_chunks_that_make_several_steps_each() -> None:
    """Two chunks at once share four steps: each makes two before the next one comes (StreamDiT)."""
    model = rolling_model(Stream(rolling=2, commit="last"), (1.0, 0.8, 0.6, 0.3, 0.0))
    heard = Heard(model.reader)
    rolled(model, 3, heard)
    assert [times for times, _ in heard.calls] == [
        [1.0], [0.8], [0.6, 1.0], [0.3, 0.8], [0.6, 1.0], [0.3, 0.8], [0.6], [0.3],
    ]  # fmt: skip
    session = Session(model, PROMPTS)
    assert session.counts(3) == (4, 2, 2) == tuple(len(list(session.steps())) for _ in range(3))


# --- sessions ---------------------------------------------------------------------------------------------------------------

STREAMS = {
    "window": Stream(window=5, sink=1), "last": Stream(commit="last", window=4), "chunks": Stream(chunks=(1, 2)),
    "two": Stream(rolling=2, chunks=(2,), window=8, sink=2, positions="sink"),
}  # fmt: skip


def times_of(stream: Stream) -> tuple[float, ...]:
    return (1.0, 0.8, 0.6, 0.3, 0.0) if stream.rolling else THREE


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_clip_is_a_window_that_rolls_to_its_end(stream: Stream, guidance: CFG) -> None:
    model = rolling_model(stream, times_of(stream), guidance=guidance)
    count, frames = 6, sum(model.card.contract.stream.length(i) for i in range(6))  # type: ignore[union-attr]
    whole, clip = rolled(model, count), model.latents(PROMPTS, num_frames=frames)
    assert torch.equal(clip, torch.cat(whole, 2))
    endless = made(Session(model, PROMPTS), count)
    ahead = model.card.contract.stream.rolling - 1  # type: ignore[union-attr]
    same = [torch.equal(a, b) for a, b in zip(endless, whole, strict=True)]
    assert (
        same == [True] * (count - ahead) + [False] * ahead
    )  # the last chunks see those that follow, where there are any


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_session_is_restored_bit_for_bit_and_cancelled_without_a_trace(stream: Stream) -> None:
    """A snapshot holds the chunks that are half-made."""
    model = rolling_model(stream, times_of(stream))
    whole, session = made(Session(model, PROMPTS), 6), Session(model, PROMPTS)
    made(session, 3)
    paused = session.snapshot
    bits = [x.clone() for x in (*(x for layer in paused.memory.layers for x in layer), *(f.x for f in paused.window))]
    assert len(paused.window) == model.card.contract.stream.rolling - 1  # type: ignore[union-attr]
    given_up = session.steps()
    next(given_up)
    given_up.close()
    assert session.snapshot is paused
    made(session, 2)  # somebody goes on
    now = (*(x for layer in paused.memory.layers for x in layer), *(f.x for f in paused.window))
    assert all(torch.equal(a, b) for a, b in zip(bits, now, strict=True))
    again = made(Session(model, paused), 3)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[3:], strict=True))


def test_another_prompt_reaches_the_chunks_in_the_window_gradually() -> None:
    """Those that were begun under the old one keep what it gave them; a chunk that enters later has the new one alone."""
    model = rolling_model(Stream(window=4), THREE)
    heard, others = Heard(model.reader), ["a green cross turns", "a yellow square falls"]
    session = Session(model, PROMPTS)
    first = made(session, 3)
    paused = session.snapshot
    session.steer(others)
    after = made(session, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, made(Session(model, PROMPTS), 3), strict=True))
    old = made(Session(model, paused), 4)
    assert not any(torch.equal(a, b) for a, b in zip(after, old, strict=True))
    cond, uncond = model.conditions(others)
    with torch.no_grad():  # one call of the oldest chunk, under the new prompt
        noise = Seeds((0, 1)).fold("chunk/5").randn((2, 4, 1, 8, 8), "start")
        by_hand = rolling(model, heard).tick(
            paused.memory, (*paused.window, Flying(5, noise)), cond, uncond, Seeds((0, 1))
        )
    assert torch.equal(by_hand.x, after[0]) and heard.calls[0][0] == [0.4, 0.7, 1.0]
    session.steer(PROMPTS, "recache")
    session.steer(PROMPTS, "clear")
    made(session, 1)


def test_a_live_stream_rolls_and_is_restored() -> None:
    """Shown before they are remembered; the end of the stream is that of the clip."""
    model = rolling_model(Stream(window=5, sink=1), THREE)
    with LiveSession(Session(model, PROMPTS), beside=False) as live:
        shown = list(live.frames(2))
        where = live.snapshot()
        shown += live.frames(4, last=True)
    whole = to_uint8(model.decode(model.latents(PROMPTS, num_frames=6))).movedim(1, -1)
    assert (torch.cat([chunk.frames for chunk in shown], 1).int() - whole.int()).abs().max() <= 1
    with LiveSession.restore(model, where, beside=False) as again:
        rest = list(again.frames(4, last=True))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(rest, shown[2:], strict=True))


def test_what_a_window_cannot_do_is_refused() -> None:
    model = rolling_model(Stream(), THREE)
    session = Session(model, PROMPTS)
    video = Video(lambda chunk: torch.zeros(2, 4, 1, 8, 8))
    for given in ({"video": video}, {"extra": {"pose": torch.zeros(2, 1, 6)}}):
        with pytest.raises(ValueError, match="leave out video and extra"):
            next(session.steps(**given))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave the cache out"):
        Session(model, PROMPTS, cache=SkipMiddle())
    with pytest.raises(ValueError, match="4 steps cannot be shared by the 3 chunks"):
        Session(model, PROMPTS, num_inference_steps=4, force=True)
    with pytest.raises(ValueError, match="reads everything or a window of the past, and .* by Retrieval"):
        Session(rolling_model(Stream(memory=Retrieval()), THREE), PROMPTS)
    with pytest.raises(ValueError, match="one number of steps; got rolling=2 and steps="):
        Stream(rolling=2, steps=(2,))
    with pytest.raises(ValueError, match="6 frames cannot hold a sink of 1 and 3 chunks of 2"):
        Stream(chunks=(2,), rolling=3, window=6, sink=1)


def test_what_cannot_roll_is_refused() -> None:
    model = rolling_model(Stream(), THREE, sampler=Heun())
    with pytest.raises(ValueError, match="Heun takes 5 calls for 3 steps"):
        rolling(model)
    model = rolling_model(Stream(steps=(3,)), THREE)
    with pytest.raises(ValueError, match=r"leave stream\.steps out"):
        rolling(model)


@pytest.mark.parametrize("pattern", [BlockCausal(), BlockCausal(window=4, sink=1)], ids=["all", "window"])
def test_a_causal_network_does_not_roll(pattern: BlockCausal) -> None:
    """Its chunks would read earlier ones alone, whatever the stream says; one after the other they may."""
    model = rolling_model(Stream(rolling=3, window=pattern.window, sink=pattern.sink), THREE)
    causal = model.with_part("denoiser", repattern(model.denoiser, pattern))
    with pytest.raises(ValueError, match="both directions.*BlockCausal.*pattern Dense, or .*mutual: false"):
        made(Session(causal, PROMPTS), 1)
    alone = replace(model.card.contract, stream=replace(model.card.contract.stream or Stream(), rolling=1))
    with torch.no_grad():
        window = Rolling(chunks=Chunks.of(causal.reader, alone))
        assert len(list(window.take(2, SHAPE, *causal.conditions(PROMPTS), Seeds((0, 1))))) == 2
    for stream in (alone.stream or Stream(), Stream(rolling=3, mutual=False)):
        if not (pattern.window and stream.rolling == 3):  # a call of one chunk alone has a window
            other = causal.with_card(contract=replace(model.card.contract, stream=stream))
            assert len(made(Session(other, PROMPTS), 2)) == 2
