"""Live streams: frames as soon as they are there, prompts at times, pause, cancel, restore; and nothing depends on scheduling."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fewstep.attention import BlockCausal
from fewstep.core import Rng, Seeds
from fewstep.core.finite import NonFiniteError
from fewstep.core.pixels import to_uint8
from fewstep.diffusion import Contract, Exact, Renoise, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.decoding import Decoded
from fewstep.models.repattern import repattern
from fewstep.models.runtime import Runtime
from fewstep.streaming import LiveChunk, LiveSession, Session, Video
from support_engine import tiny_model

pytestmark = pytest.mark.usefixtures("single_thread")
PROMPTS = ("a red ball rolls left", "a blue star stays")
BESIDE = pytest.mark.parametrize("beside", [True, False], ids=["beside", "between"])


def streaming_model(stream: Stream = Stream(chunks=(2,), window=5, sink=1)) -> VideoModel:
    """The tiny model in two steps with fresh noise, at 4 frames a second."""
    model = tiny_model()
    pattern = BlockCausal(chunk=max(stream.chunks), window=stream.window, sink=stream.sink)
    grid = Exact(grids=((1.0, 0.5, 0.0),), otherwise=Shifted())
    contract = Contract(sampler=Renoise(), steps=2, grid=grid, stream=stream)
    return model.with_part("denoiser", repattern(model.denoiser, pattern), contract=contract, fps=4.0)


@pytest.fixture
def model() -> VideoModel:
    return streaming_model()


@pytest.fixture
def calls(model: VideoModel) -> list[float]:
    """The times of all network calls, as they come."""
    seen = list[float]()
    model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(round(float(inputs[1][0]), 2)))
    return seen


def live(model: VideoModel, *prompts: str, seed: int = 0, beside: bool = True) -> LiveSession:
    return LiveSession(Session(model, prompts or PROMPTS, seed=seed), beside=beside)


def begin(session: LiveSession, index: int, *, finish: bool = False) -> list[LiveChunk]:
    """Work until this chunk has been begun, or its latents are finished; what was shown meanwhile."""
    shown = list[LiveChunk]()
    while session._making is None or session._making.index < index or (finish and not session._making.made):
        if (made := session.work()) is not None:
            shown.append(made)
    return shown


def joined(chunks: list[LiveChunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], 1)


def same(a: list[LiveChunk], b: list[LiveChunk]) -> bool:
    facts = [[(c.index, c.first, c.seconds, c.prompts, c.version) for c in some] for some in (a, b)]
    return facts[0] == facts[1] and torch.equal(joined(a), joined(b))


@BESIDE
def test_frames_are_those_of_the_whole_clip(beside: bool, model: VideoModel) -> None:
    chunks = list(live(model, beside=beside).frames(4))
    whole = model.decode(model.latents(list(PROMPTS), num_frames=8))
    assert joined(chunks).dtype == torch.uint8 and joined(chunks).shape == (
        2,
        8,
        model.card.height,
        model.card.width,
        3,
    )
    assert (joined(chunks).int() - to_uint8(whole).movedim(1, -1).int()).abs().max() <= 1
    assert [(c.index, c.first, c.seconds) for c in chunks] == [(0, 0, 0.0), (1, 2, 0.5), (2, 4, 1.0), (3, 6, 1.5)]
    assert all(c.prompts == PROMPTS and c.version == 0 for c in chunks)
    assert all(c.took.denoise > 0 and c.took.decode > 0 for c in chunks)
    assert chunks[0].took.commit == 0 and all(c.took.commit > 0 for c in chunks[1:])


@BESIDE
def test_the_first_frames_do_not_wait_for_the_commit(beside: bool, model: VideoModel, calls: list[float]) -> None:
    session = live(model, beside=beside)
    next(session.frames())
    assert calls == [1.0, 0.5]
    list(session.frames(1))
    assert calls == [1.0, 0.5, 0.0, 1.0, 0.5]


@BESIDE
@pytest.mark.parametrize("last", [True, False])
def test_a_chunk_is_remembered_when_another_follows(
    last: bool, beside: bool, model: VideoModel, calls: list[float]
) -> None:
    list(live(model, beside=beside).frames(3, last=last))
    assert calls == [1.0, 0.5, 0.0, 1.0, 0.5, 0.0, 1.0, 0.5]


def test_two_streams_in_turns_are_two_streams(model: VideoModel) -> None:
    alone = [list(live(model, prompt, seed=seed).frames(3)) for seed, prompt in enumerate(PROMPTS)]
    sessions = [live(model, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    shown: list[list[LiveChunk]] = [[], []]
    while min(map(len, shown)) < 3:
        for session, chunks in zip(sessions, shown, strict=True):
            made = session.work(3)
            chunks += [made] if made is not None else []
    assert all(same(a, b) for a, b in zip(alone, shown, strict=True))


@BESIDE
def test_restored_it_goes_on_bit_for_bit(beside: bool, model: VideoModel) -> None:
    whole = list(live(model, beside=beside).frames(5))
    session = live(model, beside=beside)
    begin, paused = list(session.frames(2)), session.snapshot()
    on = list(session.frames(3))
    again = LiveSession.restore(model, paused, beside=beside)
    assert same(begin + on, whole) and same(list(again.frames(3)), whole[2:])
    assert live(model).snapshot().session.chunks == 0


def test_a_snapshot_amid_other_work_is_where_the_viewer_is(model: VideoModel) -> None:
    """Chunks that are made ahead are not in it, and prompts that they have are to come."""
    late = Late(model)
    whole, session = live(late), live(late)  # type: ignore[arg-type]
    for one in (whole, session):
        one.prompt("a green cross turns", chunk=1)
        one.prompt("a red square stays", chunk=3)
    expected, shown = list(whole.frames(5)), [next(session.frames())]
    late.open.clear()
    assert begin(session, 3) == [] and session._session.snapshot.chunks == 3
    paused = session.snapshot()
    late.open.set()
    assert [chunk for chunk, *_ in paused.switches] == [1, 3] and paused.session.chunks == 1
    again = LiveSession.restore(late, paused)  # type: ignore[arg-type]
    assert same(shown + list(again.frames(4)), expected)


def test_on_a_cpu_chunks_are_decoded_between_two_chunks(model: VideoModel) -> None:
    """Its cores are the denoiser's; who wants a thread for decoding asks for it."""
    threads = threading.active_count()
    with model.stream(PROMPTS) as session:
        assert same(list(session.frames(3)), list(live(model).frames(3)))
        assert session._decoder._pool is None
    assert threading.active_count() <= threads + 1  # that of the live session beside it


@pytest.mark.parametrize("how", ["keep", "recache", "clear", "lerp"])
def test_prompts_change_in_the_ways_of_a_session(how: Any, model: VideoModel) -> None:
    """Also those to come in a snapshot."""
    by_hand = Session(model, PROMPTS)
    latents = list(by_hand.take(2))
    by_hand.steer(("a green cross turns",) * 2, how)
    latents += list(by_hand.take(2))
    session = live(model)
    session.prompt("a green cross turns", chunk=2, how=how)
    first, paused = list(session.frames(1)), session.snapshot()
    shown = [*first, *LiveSession.restore(model, paused).frames(3)]
    expected = to_uint8(model.decode(torch.cat(latents, 2))).movedim(1, -1)
    assert (joined(shown).int() - expected.int()).abs().max() <= 1


def test_a_way_that_the_stream_does_not_have_is_refused_at_once(model: VideoModel) -> None:
    last = model.with_card(contract=replace(model.card.contract, stream=Stream(chunks=(2,), commit="last", window=4)))
    with pytest.raises(ValueError, match="choose another switch"):
        live(last).prompt("a green cross turns", how="recache")
    with pytest.raises(ValueError, match="how must be one of"):
        live(model).prompt("a green cross turns", how="fade")  # type: ignore[arg-type]


def test_prompts_apply_from_the_first_chunk_that_starts_then(model: VideoModel) -> None:
    """Chunks of 2 frames start at 0, 0.5, 1, 1.5 s."""
    session = live(model)
    assert [session.chunk_at(seconds) for seconds in (0.0, 0.1, 0.5, 0.51, 1.5)] == [0, 1, 1, 2, 3]
    assert session.prompt("a green cross turns", at=0.6) == 2
    chunks = list(session.frames(4))
    plain = list(live(model).frames(4))
    assert [c.version for c in chunks] == [0, 0, 1, 1]
    assert [c.prompts for c in chunks] == [PROMPTS] * 2 + [("a green cross turns",) * 2] * 2
    assert [torch.equal(a.frames, b.frames) for a, b in zip(chunks, plain, strict=True)] == [True, True, False, False]
    by_hand = Session(model, PROMPTS)
    latents = list(by_hand.take(2))
    by_hand.steer(["a green cross turns"] * 2)
    latents += list(by_hand.take(2))
    expected = to_uint8(model.decode(torch.cat(latents, 2))).movedim(1, -1)
    assert (joined(chunks).int() - expected.int()).abs().max() <= 1


def test_a_prompt_for_the_past_applies_to_the_next_chunk(model: VideoModel) -> None:
    session = live(model, beside=False)  # so that no chunk is made while another is decoded
    frames = session.frames()
    next(frames)
    assert session.prompt("a green cross turns", at=0.0) == session.prompt("a blue ring", chunk=0) == 1
    assert next(frames).prompts == ("a blue ring",) * 2
    begin(session, 2)
    assert session.prompt(["a", "b"]) == 3


def test_prompts_that_cannot_be(model: VideoModel) -> None:
    session = live(model)
    with pytest.raises(ValueError, match="2 clips, and was given 3 prompts"):
        session.prompt(["a", "b", "c"])
    with pytest.raises(ValueError, match="not both; got 1.0 and 3"):
        session.prompt("a", at=1.0, chunk=3)
    for wrong in ({"at": -1.0}, {"at": float("nan")}, {"at": float("inf")}, {"chunk": -1}):
        with pytest.raises(ValueError, match="from second 0 or chunk 0 on"):
            session.prompt("a", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="say how many chunks"):
        next(session.frames(last=True))


@BESIDE
def test_pause_and_resume_leave_no_trace(beside: bool, model: VideoModel, calls: list[float]) -> None:
    whole, session = list(live(model, beside=beside).frames(3)), live(model, beside=beside)
    shown, calls[:] = list(session.frames(1)), []
    session.work()
    session.work()  # half of chunk 1
    session.pause()
    assert list(session.frames()) == [] and calls == [0.0, 1.0]
    session.resume()
    shown += list(session.frames(2))
    assert calls == [0.0, 1.0, 0.5, 0.0, 1.0, 0.5] and same(shown, whole)


@BESIDE
def test_a_chunk_that_is_cancelled_was_never_begun(beside: bool, model: VideoModel, calls: list[float]) -> None:
    whole, session = list(live(model, beside=beside).frames(3)), live(model, beside=beside)
    shown = list(session.frames(1))
    session.work()
    before, _ = session._session.snapshot, session.work()
    session.cancel()
    assert list(session.frames()) == [] and session._session.snapshot is before
    session.resume()
    calls[:] = []
    shown += list(session.frames(2))
    assert calls == [1.0, 0.5, 0.0, 1.0, 0.5] and same(shown, whole)
    session.work()
    session.work()
    session.cancel()
    assert session.prompt("a green cross turns") == 3  # the chunk that was given up


def test_prompts_of_a_chunk_that_is_cancelled_are_taken_back(model: VideoModel) -> None:
    whole, session = list(live(model).frames(3)), live(model)
    shown = list(session.frames(1))
    assert session.prompt("a green cross turns") == 1
    begin(session, 1)
    session.cancel()
    assert session.prompt(PROMPTS) == 1 and session._session.snapshot.prompts == PROMPTS
    session.resume()
    shown += session.frames(2)
    assert torch.equal(joined(shown), joined(whole)) and [c.version for c in shown] == [0, 1, 1]


def test_what_was_made_is_shown_after_a_cancel_and_stays_made(model: VideoModel) -> None:
    whole, session = list(live(model).frames(4)), live(model)
    frames = session.frames()
    shown = [next(frames), *begin(session, 2, finish=True)]
    session.cancel()
    shown += list(frames)
    assert [c.index for c in shown] == [0, 1, 2]
    session.resume()
    assert same(shown + list(session.frames(1)), whole)


def test_another_thread_may_stop_it(model: VideoModel) -> None:
    session = live(model)
    shown = list[LiveChunk]()

    def stop() -> None:
        session.prompt("a green cross turns")
        session.cancel()

    for chunk in session.frames():
        shown.append(chunk)
        if chunk.index == 1:
            thread = threading.Thread(target=stop)
            thread.start()
            thread.join()
    assert 2 <= len(shown) <= 4 and shown[1].version == 0


class Late:
    """A model whose decoder gives the frames of a latent when it has seen the next one, and says how many it has been given."""

    def __init__(self, model: VideoModel) -> None:
        self.model, self.asked, self.open = model, list[int](), threading.Event()
        self.open.set()
        self.fail_at: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def decode_next(self, latents: Tensor, past: Any = None, *, last: bool = False) -> Decoded:
        self.asked.append(latents.shape[2])
        self.open.wait(10)
        if self.fail_at == len(self.asked) - 1:
            raise RuntimeError("the decoder is broken")
        seen = latents if past is None else torch.cat([past, latents], 2)
        now, rest = (seen, seen[:, :, :0]) if last else (seen[:, :, :-1], seen[:, :, -1:])
        return Decoded(self.model.decode_next(now).frames, rest)


@BESIDE
def test_decoders_that_wait(beside: bool, model: VideoModel) -> None:
    expected = joined(list(live(model).frames(4)))
    session = live(Late(model), beside=beside)  # type: ignore[arg-type]
    chunks = list(session.frames(4, last=True))
    assert [c.frames.shape[1] for c in chunks] == [1, 2, 2, 3] and [c.first for c in chunks] == [0, 1, 3, 5]
    assert (joined(chunks).int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="has ended"):
        session.work()
    late = Late(model)
    session = live(late, beside=beside)  # type: ignore[arg-type]
    list(session.frames(2))
    again = LiveSession.restore(late, session.snapshot(), beside=beside)  # type: ignore[arg-type]
    assert [c.first for c in again.frames(2, last=True)] == [3, 5]


def test_a_chunk_that_was_made_ahead_is_not_the_last(model: VideoModel) -> None:
    late = Late(model)
    session = live(late)  # type: ignore[arg-type]
    next(session.frames())
    late.open.clear()
    assert begin(session, 1, finish=True) == []
    late.open.set()
    with pytest.raises(ValueError, match="as if others followed"):
        next(session.frames(1, last=True))
    assert [c.index for c in session.frames(2, last=True)] == [1, 2]


def test_at_most_two_chunks_wait_for_their_frames(model: VideoModel, calls: list[float]) -> None:
    late = Late(model)
    session = live(late)  # type: ignore[arg-type]
    next(session.frames())
    late.open.clear()
    threading.Timer(0.5, late.open.set).start()
    begin(session, 3, finish=True)
    assert late.open.is_set()  # chunk 3 waited for the frames of chunk 1


@BESIDE
def test_errors_of_the_decoder_reach_the_caller_at_their_chunk(beside: bool, model: VideoModel) -> None:
    late = Late(model)
    late.fail_at = 1
    session = live(late, beside=beside)  # type: ignore[arg-type]
    frames = session.frames(3)
    assert next(frames).index == 0
    good = session.snapshot()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="decoder is broken"):
            list(session.frames(3))
    late.fail_at = None
    assert [c.index for c in LiveSession.restore(late, good, beside=beside).frames(2)] == [1, 2]  # type: ignore[arg-type]


def test_bad_numbers_are_not_shown(model: VideoModel) -> None:
    model.codec.mean.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="frames of a live stream"):
        next(live(model).frames())


def test_an_error_of_a_call_leaves_the_chunk_unbegun(model: VideoModel) -> None:
    whole, session = list(live(model).frames(3)), live(model)
    shown, forward, broken = list(session.frames(1)), model.denoiser.backbone.forward, [2]

    def breaks(*inputs: Any) -> Any:
        broken[0] -= 1
        if broken[0] == 0:
            raise MemoryError
        return forward(*inputs)

    model.denoiser.backbone.forward = breaks  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        list(session.frames(1))
    assert same(shown + list(session.frames(2)), whole)
    broken[0] = 1
    with pytest.raises(MemoryError):
        session.snapshot()
    with pytest.raises(ValueError, match="remembering it failed"):
        session.snapshot()


def test_a_closed_session_makes_nothing(model: VideoModel) -> None:
    with live(model) as session:
        next(session.frames())
        pool = session._decoder._pool
    with pytest.raises(ValueError, match="has ended"):
        session.work()
    assert pool is not None and all(not thread.is_alive() for thread in pool._threads)


def test_memory_is_flat(model: VideoModel) -> None:
    """What a live session holds of the past does not grow."""
    session = live(model)
    sizes, asides = set[int](), list[int]()
    for _ in session.frames(6):
        layers = session.snapshot().session.memory.layers
        sizes.add(sum(x.numel() for layer in layers for x in layer))
        asides.append(len(session._undecoded))
    assert len(sizes) == 1 and max(asides) <= 2


def walk(chunks: Iterator[LiveChunk]) -> list[int]:
    return [chunk.index for chunk in chunks]


def test_a_loop_that_was_left_goes_on(model: VideoModel) -> None:
    session = live(model)
    for _ in session.frames():
        break
    assert walk(session.frames(2)) == [1, 2] and walk(session.frames(0)) == []
    assert replace(session.snapshot(), switches=()).frames == 6


def test_a_stream_in_a_window_compiles_nothing_after_its_second_chunk() -> None:
    model, counter = streaming_model(Stream(chunks=(2,), window=8, sink=2)), CompileCounter()
    torch._dynamo.reset()
    for block in model.denoiser.backbone.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    session, graphs = live(model), list[int]()
    for _ in session.frames(7):
        session.snapshot()  # with the chunk's commit
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 6


class Reads(TorchDispatchMode):
    """Operations that wait for the device to learn a number of a tensor which was computed there."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.found, self.computed = list[str](), WeakTensorKeyDictionary()
        for tensor in there:
            self.computed[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x in self.computed for x in tree_leaves((args, kwargs))):
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
                self.found.append(str(func))
            for x in tree_leaves(made):
                if isinstance(x, Tensor):
                    self.computed[x] = True
        return made


def test_no_call_waits_for_a_number_of_the_device(model: VideoModel) -> None:
    """Positions and masks of the memory are known on the CPU; a stream on a GPU never waits inside a chunk."""
    session, weights = Session(model, PROMPTS), list(model.denoiser.parameters())
    texts = [x for cond in session._conditions for x in cond.tensors]
    with torch.no_grad(), Reads(*weights, *model.denoiser.buffers(), *texts) as reads:
        list(session.take(3))
    assert len(reads.computed) > len(weights) and reads.found == []
    with torch.no_grad(), Reads(*weights) as reads:
        bool(weights[0].sum() > 0)
    assert reads.found == ["aten._local_scalar_dense.default"]


def clip(model: VideoModel, frames: int) -> Tensor:
    return Rng(5).randn((2, 4, frames, *model.latent_shape()[2:]), "clip")


def changes(model: VideoModel, strength: float) -> Video:
    """A clip of 10 latent frames, in chunks of 2."""
    return Video(lambda index: clip(model, 10)[:, :, 2 * index : 2 * index + 2], strength)


def test_a_video_is_changed_from_the_time_of_its_strength(model: VideoModel, calls: list[float]) -> None:
    session = Session(model, PROMPTS)
    list(session.take(1, changes(model, 0.7)))
    calls[:] = []
    steps = list(session.steps(changes(model, 0.7)))
    noise = Seeds((0, 1)).fold("chunk/1").randn((2, 4, 2, 8, 8), "start")
    assert calls == [0.5, 0.0] and len(steps) == 1
    torch.testing.assert_close(steps[0].prediction.x_t, 0.5 * clip(model, 10)[:, :, 2:4] + 0.5 * noise)


def test_at_full_strength_nothing_of_the_video_is_left(model: VideoModel) -> None:
    session = model.stream(PROMPTS, video=changes(model, 1.0))
    assert same(list(session.frames(3)), list(live(model).frames(3)))


@BESIDE
def test_a_changed_video_goes_on_bit_for_bit(beside: bool, model: VideoModel) -> None:
    video = changes(model, 0.5)
    whole = list(LiveSession(Session(model, PROMPTS), video=video, beside=beside).frames(4))
    session = LiveSession(Session(model, PROMPTS), video=video, beside=beside)
    begun = list(session.frames(2))
    again = LiveSession.restore(model, session.snapshot(), video=video, beside=beside)
    assert same(begun + list(again.frames(2)), whole)


def test_videos_that_do_not_fit(model: VideoModel) -> None:
    session = Session(model, PROMPTS)
    with pytest.raises(ValueError, match=r"below the student's last step, at 0.5; give one of its times, 1, 0.5"):
        next(session.steps(changes(model, 0.4)))
    list(session.take(1))
    with pytest.raises(ValueError, match="chunk 1 has latents .* was given as"):
        next(session.steps(Video(lambda _: clip(model, 3), 0.5)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_frames_are_the_same_beside_and_between() -> None:
    model = streaming_model().prepared(Runtime(device="cuda"))
    beside, between = (list(live(model, beside=beside).frames(6)) for beside in (True, False))
    assert not joined(beside).is_cuda and (joined(beside).int() - joined(between).int()).abs().max() <= 1
    session = live(model)
    shown = list(session.frames(3))
    again = LiveSession.restore(model, session.snapshot())
    assert (joined(shown + list(again.frames(3))).int() - joined(beside).int()).abs().max() <= 1
