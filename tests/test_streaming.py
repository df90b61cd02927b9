"""Streams: the loop equals one masked forward, and a session is where its snapshot says it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, sin, tau
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import (
    KEEPS,
    BlockCausal,
    CompressedMemory,
    Decaying,
    Dense,
    Everything,
    Facing,
    Importance,
    Int8Memory,
    KVCache,
    MovingSink,
    Prefix,
    Retrieval,
    StateCausal,
    StateMemory,
    TopK,
    Window,
    attending,
    operate,
)
from fewstep.attention.pattern import Pattern
from fewstep.caching import SkipMiddle
from fewstep.core import Call, Rng, Seeds
from fewstep.core.call import Place, Runner, S
from fewstep.diffusion import CFG, EDM, Contract, Exact, Memory, Renoise, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.models.video_dit import CrossAttention
from fewstep.streaming import Chunks, Session
from fewstep.streaming.blocks import keep_of, one_after_the_other
from support_engine import shaken, tiny_model

PROMPTS = ["a red ball rolls left", "a blue star stays"]
TWO_STEPS = ((1.0, 0.5, 0.0),)


def streaming_model(stream: Stream, guidance: CFG = CFG(), depth: int = 2) -> VideoModel:
    """The tiny model, frame by frame or in chunks, in two steps with fresh noise."""
    model = tiny_model(depth=depth)
    pattern: Pattern = BlockCausal(chunk=max(stream.chunks), window=stream.window, sink=stream.sink)
    if isinstance(memory := stream.memory, StateMemory):
        pattern = StateCausal(chunk=max(stream.chunks), window=memory.window, sink=memory.sink)
    contract = Contract(
        sampler=Renoise(), steps=2, grid=Exact(grids=TWO_STEPS, otherwise=Shifted()), guidance=guidance, stream=stream
    )
    network = repattern(model.denoiser, pattern)
    if isinstance(pattern, StateCausal):
        for block in network.backbone.blocks:
            shaken(block.attention.operation, 0.5)
    return model.with_part("denoiser", network, contract=contract)


def made(session: Session, chunks: int) -> list[Tensor]:
    return list(session.take(chunks))


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "stream", [Stream(), Stream(window=3, sink=1), Stream(chunks=(2,), window=5, sink=1)], ids=["all", "sink", "chunks"]
)
def test_a_session_is_masked_forwards(stream: Stream, guidance: CFG) -> None:
    """Without any memory: the finished chunks are clean at time 0 before the one that is being made."""
    model, length = streaming_model(stream, guidance), stream.chunks[0]
    chunks = made(Session(model, PROMPTS), 9 // length)
    done, (cond, uncond) = torch.cat(chunks, 2), model.conditions(PROMPTS)
    index = len(chunks) - 1
    noise, before = Seeds((0, 1)).fold(f"chunk/{index}"), done[:, :, : index * length]
    x = noise.randn(chunks[0].shape, "start")
    for step, (t, s) in enumerate([(1.0, 0.5), (0.5, 0.0)]):
        times = torch.tensor([[0.0] * before.shape[2] + [t] * length] * 2)
        with torch.no_grad():
            prediction = guidance(model.denoiser, torch.cat([before, x], 2), times, cond, uncond)
        x0 = prediction.x0[:, :, -length:]
        x = (
            x0
            if s == 0
            else model.denoiser.path.add_noise(x0, noise.randn(x0.shape, f"renoise/{step}"), torch.tensor([s, s]))
        )
    torch.testing.assert_close(chunks[-1], x, atol=1e-5, rtol=1e-5)


def test_restored_from_a_snapshot_it_goes_on_bit_for_bit() -> None:
    model = streaming_model(Stream(window=3, sink=1))
    whole = made(Session(model, PROMPTS), 6)
    session = Session(model, PROMPTS)
    made(session, 2)
    paused = session.snapshot
    made(session, 2)  # somebody goes on
    again = made(Session(model, paused), 4)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[2:], strict=True))


POLICIES = {
    "everything": Stream(), "window": Stream(window=3, sink=1), "rebased": Stream(window=3, positions="rebased"),
    "prefix": Stream(memory=Prefix(frames=1), positions="sink"),
    "moving sink": Stream(memory=MovingSink(window=4, sink=1, decay=0.5)),
    "importance": Stream(memory=Importance(window=4, sink=1), positions="window"),
    "retrieval": Stream(memory=Retrieval(frames=1, recent=1, sink=1)), "decaying": Stream(memory=Decaying(half=1.0, sink=1)),
    "int8": Stream(memory=Int8Memory(keep=Importance(window=4))), "state": Stream(memory=StateMemory(window=3, sink=1)),
}  # fmt: skip


def test_every_policy_is_streamed_but_the_one_that_needs_poses() -> None:
    kinds = {type(keep_of(stream)) for stream in POLICIES.values()}
    assert set(KEEPS) - kinds == {Facing, CompressedMemory}  # whose streams are in test_compressed.py


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("stream", POLICIES.values(), ids=POLICIES)
def test_every_policy_is_restored_bit_for_bit_and_cancelled_without_a_trace(stream: Stream, guidance: CFG) -> None:
    model = streaming_model(stream, guidance)
    whole, session = made(Session(model, PROMPTS), 6), Session(model, PROMPTS)
    made(session, 3)
    paused = session.snapshot
    bits = [x.clone() for layer in paused.memory.layers for x in layer] + [x.clone() for x in paused.memory.states]
    given_up = session.steps()
    next(given_up)
    given_up.close()
    assert session.snapshot is paused
    made(session, 2)  # somebody goes on
    here = [*(x for layer in paused.memory.layers for x in layer), *paused.memory.states]
    assert all(torch.equal(a, b) for a, b in zip(bits, here, strict=True))
    again = made(Session(model, paused), 3)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[3:], strict=True))


def test_a_stream_reads_the_frames_that_saw_what_it_will_see() -> None:
    """Poses come with the condition of each chunk, and are remembered with it, of both branches of guidance."""
    for guidance in (CFG(), CFG(scale=3.0)):
        model = streaming_model(Stream(memory=Facing(frames=1, recent=1, sink=0, reach=100.0)), guidance)
        loop = Chunks(network=model.reader, contract=model.card.contract, times=(1.0, 0.5, 0.0))
        cond, uncond = model.conditions(PROMPTS)
        memory = loop.begin()
        for frame, turn in enumerate((0.0, 0.25, 0.5, 0.0)):
            pose = torch.tensor([[[0.0, 0.0, 0.0, cos(turn * tau), sin(turn * tau), 0.0]]] * 2)
            noise = Seeds((0, 1)).fold(str(frame))
            facing = cond.with_extra({"pose": pose})
            chosen = memory.facing(torch.cat([pose] * (1 + guidance.active))).read().positions if frame else None
            *_, last = loop.chunk(
                memory, noise.randn((2, 4, 1, 8, 8), "start"), facing, uncond.with_extra({"pose": pose}), noise
            )
            memory = last.memory or memory
        assert chosen is not None and chosen.tolist() == [[0, 2]] * (2 * (1 + guidance.active))


def test_a_session_is_told_where_each_chunk_looks_from() -> None:
    model = streaming_model(Stream(memory=Facing(frames=1, recent=1, sink=0, reach=100.0)), CFG(scale=3.0))

    def looking(turn: float) -> dict[str, Tensor]:
        return {"pose": torch.tensor([[[0.0, 0.0, 0.0, cos(turn * tau), sin(turn * tau), 0.0]]] * 2)}

    session = Session(model, PROMPTS)
    for turn in (0.0, 0.25, 0.5):
        list(session.steps(extra=looking(turn)))
    ahead, aside = ([*Session(model, session.snapshot).steps(extra=looking(turn))][-1].x for turn in (0.0, 0.25))
    assert not torch.equal(ahead, aside)  # other frames are read
    again = [*Session(model, session.snapshot).steps(extra=looking(0.0))][-1].x
    assert torch.equal(ahead, again)
    with pytest.raises(ValueError, match="extra 'pose'; got nothing"):
        list(session.steps())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_chunk_that_is_given_up_was_never_begun(steps: int) -> None:
    """After its first step, or after its last, before it is remembered."""
    model = streaming_model(Stream(window=3))
    whole, session = made(Session(model, PROMPTS), 3), Session(model, PROMPTS)
    before = session.snapshot
    given_up = session.steps()
    for _ in range(steps):
        next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert session.snapshot is before
    assert all(torch.equal(a, b) for a, b in zip(made(session, 3), whole, strict=True))


def test_steering_changes_what_follows() -> None:
    model = streaming_model(Stream())
    whole, session = made(Session(model, PROMPTS), 4), Session(model, PROMPTS)
    steered = made(session, 2)
    session.steer(["a green cross turns", PROMPTS[1]])
    steered += made(session, 2)
    alike = [[torch.equal(a[row], b[row]) for a, b in zip(whole, steered, strict=True)] for row in (0, 1)]
    assert alike == [[True, True, False, False], [True] * 4]
    assert session.snapshot.prompts[0] == "a green cross turns"
    with pytest.raises(ValueError, match="2 clips, and was given 1 prompts"):
        session.steer(["one"])


def test_nothing_of_an_earlier_prompt_is_kept() -> None:
    """Keys of the text are computed once for a prompt; after `steer` they are those of the new one."""
    model = streaming_model(Stream(window=3))
    session = Session(model, PROMPTS)
    made(session, 1)
    session.steer(["a green cross turns", "a red square stays"])
    fresh = Session(model, session.snapshot)
    assert all(torch.equal(a, b) for a, b in zip(made(session, 2), made(fresh, 2), strict=True))


def test_keys_of_the_text_are_computed_once_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = streaming_model(Stream(window=3)), list[int]()
    words = CrossAttention.words
    monkeypatch.setattr(CrossAttention, "words", lambda self, text: reads.append(1) or words(self, text))
    session = Session(model, PROMPTS)
    made(session, 3)
    assert len(reads) == len(model.denoiser.backbone.blocks)
    session.steer(PROMPTS)
    made(session, 2)
    assert len(reads) == 2 * len(model.denoiser.backbone.blocks)


def test_a_clip_depends_on_its_own_seed_and_prompt_only() -> None:
    model = streaming_model(Stream(window=3))
    both = made(Session(model, PROMPTS), 3)
    alone = made(Session(model, PROMPTS[1:], seed=1), 3)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_stream() -> None:
    session = Session(streaming_model(Stream(window=4, sink=1)), PROMPTS)
    sizes = set()
    for _ in session.take(12):
        sizes.add(sum(x.numel() for layer in session.snapshot.memory.layers for x in layer))
    assert len(sizes) == 1
    assert sorted(session.snapshot.memory.positions.tolist()) == [0, 10, 11]


def test_what_is_remembered_is_what_the_contract_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean latents at 0; noised ones at their time; or nothing more than the last step made."""
    calls: list[tuple[float, ...]] = []
    for commit, time in (("clean", 0.0), ("noised", 0.1), ("last", 0.0)):
        model = streaming_model(Stream(commit=commit, context_time=time))  # type: ignore[arg-type]
        forward = model.denoiser.backbone.forward
        seen: list[float] = []

        def told(x: Tensor, t: Tensor, *rest: Any, seen=seen, forward=forward) -> Any:  # type: ignore[no-untyped-def]
            seen.append(round(float(t[0]), 3))
            return forward(x, t, *rest)

        monkeypatch.setattr(model.denoiser.backbone, "forward", told)
        made(Session(model, PROMPTS), 1)
        calls.append(tuple(seen))
    assert calls == [(1.0, 0.5, 0.0), (1.0, 0.5, 0.1), (1.0, 0.5)]


def test_a_cache_policy_serves_every_chunk_anew() -> None:
    model = streaming_model(Stream(window=3), depth=4)
    plain = made(Session(model, PROMPTS), 3)
    exact = made(Session(model, PROMPTS, cache=SkipMiddle(every=1)), 3)
    cached = made(Session(model, PROMPTS, cache=SkipMiddle(every=2)), 3)
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    last = streaming_model(Stream(window=3, commit="last"), depth=4)
    with pytest.raises(ValueError, match="nothing to commit"):
        made(Session(last, PROMPTS, cache=SkipMiddle(every=2)), 1)


def test_the_first_chunk_may_be_shorter() -> None:
    stream = Stream(chunks=(1, 2))
    assert [stream.length(i) for i in range(4)] == [1, 2, 2, 2]
    model = tiny_model()
    contract = replace(model.card.contract, stream=stream)
    model = model.with_part("denoiser", repattern(model.denoiser, Dense()), contract=contract)
    assert [x.shape[2] for x in made(Session(model, PROMPTS), 3)] == [1, 2, 2]


def test_the_memory_of_a_stream() -> None:
    assert keep_of(Stream()) == Everything()
    assert keep_of(Stream(chunks=(1, 3), window=9, sink=2)) == Window(window=9, sink=2)
    assert keep_of(Stream(memory=Prefix(frames=2))) == Prefix(frames=2)
    model = streaming_model(Stream(chunks=(1, 3), window=9, sink=2, positions="window"))
    begun = Chunks(network=model.reader, contract=model.card.contract, times=(1.0, 0.0)).begin()
    assert (begun.keep, begun.chunk, begun.standing) == (Window(window=9, sink=2), 3, "window")
    with pytest.raises(ValueError, match="derive it from Keep"):
        keep_of(Stream(memory=Foreign()))


class Foreign(Memory):
    """A policy that says nothing of what is kept."""

    def check(self, chunk: int) -> None:
        pass


def test_a_model_of_whole_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="makes whole clips"):
        Session(tiny_model(), PROMPTS)


def test_gradient_flows_through_the_chunk_and_what_it_remembers() -> None:
    """The loop is the training rollout's, too: only sessions cut gradients."""
    model = streaming_model(Stream())
    loop = Chunks(network=model.denoiser, contract=model.card.contract, times=(1.0, 0.5, 0.0))
    cond, uncond = model.conditions(PROMPTS)
    model.denoiser.requires_grad_(True)
    first, second = (torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    start = first.requires_grad_()
    *_, one = loop.chunk(loop.begin(), start, cond, uncond, Seeds((0, 1)).fold("0"))
    assert isinstance(one.memory, KVCache)
    *_, two = loop.chunk(one.memory, second, cond, uncond, Seeds((0, 1)).fold("1"))
    two.step.x.square().sum().backward()
    assert start.grad is not None and start.grad.abs().sum() > 0


def test_noised_latents_are_remembered_as_such() -> None:
    model = streaming_model(Stream(commit="noised", context_time=0.3))
    session = Session(model, PROMPTS)
    (x,) = made(session, 1)
    noise = Seeds((0, 1)).fold("chunk/0").randn(x.shape, "context")
    view = model.denoiser.recall(KVCache.empty(), x)
    with torch.no_grad():
        expected = model.denoiser(
            0.7 * x + 0.3 * noise, torch.full((2,), 0.3), model.conditions(PROMPTS)[0], Call(kv=view)
        )
    assert expected.kv is not None
    for layer, own in zip(session.snapshot.memory.layers, expected.kv, strict=True):
        torch.testing.assert_close(layer, own, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Numbered(SkipMiddle):
    """Its runners say which of them was asked."""

    asked: list[int]
    begun: list[int]

    def begin(self) -> Runner:
        self.begun.append(len(self.begun))
        number, runner = self.begun[-1], super().begin()

        def run(block: Callable[[S], S], state: S, place: Place) -> S:
            self.asked.append(number)
            return runner(block, state, place)

        return run


def test_a_cache_begins_anew_with_every_chunk() -> None:
    policy = Numbered(asked=[], begun=[])
    made(Session(streaming_model(Stream(window=3)), PROMPTS, cache=policy), 3)
    assert policy.asked == [chunk for chunk in range(3) for _ in range(2 * 2)]  # two steps of two blocks


def test_a_stream_starts_at_the_noise_level_of_its_path() -> None:
    model = tiny_model(path=EDM(sigma_max=5.0), kind="eps")
    contract = replace(model.card.contract, stream=Stream(chunks=(2,)))
    model = model.with_part("denoiser", repattern(model.denoiser, BlockCausal(chunk=2)), contract=contract)
    first = next(Session(model, PROMPTS).steps()).prediction.x_t
    noise = Seeds((0, 1)).fold("chunk/0").randn(tuple(first.shape), "start")
    torch.testing.assert_close(first, 5.0 * noise)


@pytest.mark.parametrize("pattern", [Dense(), BlockCausal(chunk=2, window=5, sink=1), BlockCausal()], ids=str)
def test_a_past_may_count_less(pattern: Pattern) -> None:
    """By hand: weight w is log w on the logits of the past without its oldest frame, in each layer; 1 is nothing, bit for bit;
    and it reaches a stream."""
    model = streaming_model(Stream(chunks=(2,), window=5, sink=1))
    network = repattern(model.denoiser, pattern).backbone
    keep, rng = Window(window=5, sink=1), Rng(0)
    empty = KVCache.empty(keep, 2, weight=0.3)
    delta = tuple((rng.randn((2, 2, 32, 12), f"k{i}"), rng.randn((2, 2, 32, 12), f"v{i}")) for i in range(2))
    memory = empty.commit(delta, 2)  # one of three slots is empty
    x = rng.randn((2, 4, 2, 8, 8), "x")
    view = network.recall(memory, x)
    site = network.site(pattern, network.grid(x), Call(kv=view), x.device)
    q, k, v = (rng.randn((2, 2, n, 12), name) for n, name in ((32, "q"), (80, "k"), (80, "v")))
    logits = (q @ k.mT) / 12**0.5
    order = view.positions.tolist()
    for slot, position in enumerate(order):
        logits[..., 16 * slot : 16 * (slot + 1)] += {0: 0.0, 1: math.log(0.3), -1: -math.inf}[position]
    operation = pattern.operation(0, 2, 12)
    mask = operation.mask(q, k, site)
    assert (mask is None) == (pattern != BlockCausal())
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    for tier in ("auto", "reference"):
        with attending(tier):  # type: ignore[arg-type]
            torch.testing.assert_close(operate(operation, q, k, v, site), logits.softmax(-1) @ v, atol=1e-5, rtol=1e-5)
    sorted_order = sorted(order)
    assert sorted_order == [-1, 0, 1]
    streams = [Stream(chunks=(2,), window=5, sink=1, past_weight=weight) for weight in (1.0, 0.3)]
    plain, less = (torch.cat(made(Session(streaming_model(stream), PROMPTS), 3), 2) for stream in streams)
    assert torch.equal(plain[:, :, :2], less[:, :, :2]) and not torch.equal(plain[:, :, 2:], less[:, :, 2:])
    assert torch.equal(plain, torch.cat(made(Session(model, PROMPTS), 3), 2))


def test_a_weight_that_would_do_nothing_is_refused() -> None:
    for weight in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="past_weight"):
            Stream(past_weight=weight)
    with pytest.raises(ValueError, match="one call of several chunks all that is read counts alike"):
        one_after_the_other(Stream(past_weight=0.5), (1, 1))
    routed = streaming_model(Stream(window=3, past_weight=0.5))
    routed = routed.with_part("denoiser", repattern(routed.denoiser, TopK(block=4, keep=0.5)))
    with pytest.raises(ValueError, match="router cannot weigh.*past_weight to 1"):
        made(Session(routed, PROMPTS), 2)
    with pytest.raises(ValueError, match="remembers parts of frames.*past_weight to 1"):
        made(Session(streaming_model(Stream(memory=Decaying(half=0.5, sink=1), past_weight=0.5)), PROMPTS), 3)
