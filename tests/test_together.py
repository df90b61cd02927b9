"""Network calls of several streams, made as one: each stream makes what it makes alone.

Compared in float64, within 1e-9: a batch is multiplied in another order than each of its streams, so the last bits differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import cast

import pytest
import torch
from torch import Tensor

from fewstep.attention import BlockCausal, CompressCausal, CompressedMemory, Facing
from fewstep.compress import Repatterned, StepScales
from fewstep.core import Call, Cond, KVView, Seeds
from fewstep.core.call import Causal, Negative
from fewstep.diffusion import CFG, Contract, Exact, Prediction, Renoise, Step, Stream
from fewstep.models import VideoModel
from fewstep.models.adapters.dits.wan import Wan
from fewstep.models.repattern import repattern
from fewstep.streaming import Chunks, Session
from fewstep.streaming.together import Asked, Together, joined
from support_engine import shaken, tiny_model
from test_streaming import POLICIES, made, streaming_model
from tiny_models import wan_transformer

pytestmark = pytest.mark.usefixtures("single_thread")
BALL, STAR = "a red ball rolls left", "a blue star stays"
WINDOW = Stream(chunks=(2,), window=5, sink=1)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    single = Seeds.randn
    monkeypatch.setattr(Seeds, "randn", lambda self, shape, name: single(self, shape, name).double())


def double(model: VideoModel) -> VideoModel:
    model.denoiser.double().requires_grad_(False)
    model.parts["text"].double()
    return model


def batches(model: VideoModel) -> list[int]:
    """Numbers of clips in all network calls, as they come."""
    seen = list[int]()
    model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def session(model: VideoModel, prompt: str, seed: int, chunks: int) -> Session:
    """A stream that has made so many chunks."""
    one = Session(model, [prompt], seed=seed)
    made(one, chunks)
    return one


class Calls:
    """A stream whose work is one network call at a time, as the server has it."""

    def __init__(self, session: Session, extra: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.session, self.extra = session, extra
        self.steps: Generator[Step] | None = None
        self.latents = list[Tensor]()

    def __call__(self) -> None:
        if self.steps is None:
            self.steps = cast(Generator[Step], self.session.steps(extra=self.extra))
        step = next(self.steps, None)
        if step is None:  # the chunk is remembered
            self.steps = None
        elif step.index == step.steps - 1:
            self.latents.append(step.x)


def side_by_side(together: Together, calls: int, *sessions: Session, ahead: int = 1) -> list[list[Tensor]]:
    """The chunks that streams make while so many calls of each are made, and before them some calls of the first stream."""
    works = {str(number): Calls(one) for number, one in enumerate(sessions)}
    for _ in range(ahead):
        works["0"]()
    for _ in range(calls):
        for lane in together(works).values():
            lane.done.result()
    return [work.latents for work in works.values()]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("ages", [(4, 4), (6, 4)], ids=["of one age", "of different age"])
@pytest.mark.parametrize(("name", "scale"), [*((name, 1.0) for name in POLICIES), ("window", 3.0), ("int8", 3.0)])
def test_a_stream_makes_in_company_what_it_makes_alone(name: str, scale: float, ages: tuple[int, int]) -> None:
    """One is a step ahead, so it remembers chunks while the other denoises. Where a memory has another size at another age,
    calls are not joined, and equal bit for bit."""
    model, clips = double(streaming_model(POLICIES[name], CFG(scale=scale))), 2 if scale > 1 else 1
    seen, together = batches(model), Together(2)
    apart = name in ("everything", "decaying") and ages == (6, 4)
    alone = [session(model, prompt, seed, age) for seed, (prompt, age) in enumerate(zip((BALL, STAR), ages))]
    company = [Session(model, one.snapshot) for one in alone]
    expected = [made(one, 2) for one in alone]
    seen.clear()
    found = side_by_side(together, 5, *company)
    assert max(seen) == clips * (1 if apart else 2), seen
    for mine, its in zip(found, expected, strict=True):
        assert len(mine) == 2
        for a, b in zip(mine, its, strict=True):
            assert torch.equal(a, b) if apart else a.shape == b.shape
            close(a, b)
    for one, other in zip(company, alone, strict=True):
        mine, its = one.snapshot.memory, other.snapshot.memory
        if one.snapshot.chunks == other.snapshot.chunks:
            assert mine.start == its.start and mine.positions.shape == its.positions.shape
            for (k, v), (own_k, own_v) in zip(mine.layers, its.layers, strict=True):
                close(k.double(), own_k.double())
                close(v.double(), own_v.double())


@pytest.mark.parametrize("kind", [Facing, CompressedMemory])
def test_memories_that_choose_by_pose_or_compress_join_at_any_age(kind: type) -> None:
    """Once they are as full as they get."""
    memory = (
        Facing(frames=1, recent=1, sink=1) if kind is Facing else CompressedMemory(window=3, sink=1, past=2, ratio=2)
    )
    model = double(streaming_model(Stream(memory=memory)))
    if kind is CompressedMemory:
        network = repattern(model.denoiser, CompressCausal(ratio=2))
        model = double(model.with_part("denoiser", network, contract=model.card.contract))
    extra = {"pose": torch.tensor([[[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])} if kind is Facing else {}
    alone = [Calls(Session(model, [prompt], seed=seed), extra) for seed, prompt in enumerate((BALL, STAR))]
    for work, chunks in zip(alone, (7, 5), strict=True):
        for _ in range(3 * chunks):
            work()
    company, seen = [Calls(Session(model, work.session.snapshot), extra) for work in alone], batches(model)
    for _ in range(3):
        Together(2)({str(number): work for number, work in enumerate(company)})
    assert seen == [2, 2, 2]
    for mine, its in zip(company, alone, strict=True):
        its()
        its()
        close(mine.latents[-1], its.latents[-1])


def test_calls_in_which_chunks_read_apart_are_not_joined() -> None:
    """Of a window whose chunks read the earlier ones alone: each finds its past by its age."""
    model = double(streaming_model(replace(WINDOW, rolling=2, mutual=False)))
    expected = [made(Session(model, [prompt], seed=7), 2) for prompt in (BALL, STAR)]
    sizes = list[tuple[int, int]]()
    model.denoiser.register_forward_pre_hook(lambda _, inputs: sizes.append((len(inputs[0]), inputs[0].shape[2])))
    found = side_by_side(Together(2), 5, *(Session(model, [prompt], seed=7) for prompt in (BALL, STAR)), ahead=0)
    assert set(sizes) == {(2, 2), (1, 4)}  # chunks that are alone in their call, and windows
    for mine, its in zip(found, expected, strict=True):
        assert len(mine) == 2
        for a, b in zip(mine, its, strict=True):
            close(a, b)


def test_a_window_of_chunks_is_joined() -> None:
    model = double(tiny_model())
    contract = Contract(
        sampler=Renoise(),
        steps=2,
        grid=Exact(grids=((1.0, 0.5, 0.0),)),
        stream=Stream(window=4, rolling=2, mutual=True),
    )
    model = model.with_part("denoiser", model.denoiser, contract=contract)
    alone = [session(model, prompt, seed, 5) for seed, prompt in enumerate((BALL, STAR))]
    made(alone[0], 2)
    company, seen = [Session(model, one.snapshot) for one in alone], batches(model)
    found = side_by_side(Together(2), 4, *company, ahead=0)
    assert seen == [2, 2, 2, 2]
    for one, mine in zip(alone, found, strict=True):
        assert len(mine) == 2
        for a, b in zip(mine, made(one, 2), strict=True):
            close(a, b)


def test_what_is_kept_from_call_to_call_is_of_these_streams() -> None:
    """A third one takes the place of the second, then the second prompt changes: nothing of an earlier call is read."""
    model, together = double(streaming_model(WINDOW)), Together(3)
    alone = [session(model, prompt, seed, 3) for seed, prompt in enumerate((BALL, STAR, "a green square"))]
    first, second, third = (Session(model, one.snapshot) for one in alone)
    a, b = side_by_side(together, 3, first, second)
    c = side_by_side(together, 3, second, third)[1]
    close(c[0], next(alone[2].take(1)))
    second.steer([BALL])
    for one in (alone[1],):
        made(one, second.snapshot.chunks - one.snapshot.chunks)
        one.steer([BALL])
    d = side_by_side(together, 3, second, third)[0]
    close(d[0], next(alone[1].take(1)))
    assert len(a) == len(b) == 1


def test_a_snapshot_from_company_is_restored_alone() -> None:
    model = double(streaming_model(WINDOW))
    whole = [made(Session(model, [prompt], seed=seed), 6) for seed, prompt in enumerate((BALL, STAR))]
    company = [Session(model, [prompt], seed=seed) for seed, prompt in enumerate((BALL, STAR))]
    side_by_side(Together(2), 9, *company)
    for one, its in zip(company, whole, strict=True):
        chunks = one.snapshot.chunks
        assert chunks >= 3 and len(one.snapshot.memory.layers[0][0]) == 1 and one.snapshot.memory.start.ndim == 0
        close(next(Session(model, one.snapshot).take(1)), its[chunks])


def test_a_chunk_is_remembered_once() -> None:
    """Whoever asks for its memory again makes no other call."""
    model = double(streaming_model(WINDOW))
    loop, (cond, uncond), seen = Chunks.of(model.reader, model.card.contract), model.conditions([BALL]), batches(model)
    noise = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    *_, last = loop.chunk(loop.begin(), noise, cond, uncond, Seeds((0,)))
    assert last.memory is not None and last.memory is last.memory and len(seen) == 3


# --- whose call it is -----------------------------------------------------------------------------------------------------


class Sums:
    """A network that adds up its latents, and their number in the batch."""

    by_step = by_age = False

    def __init__(self) -> None:
        self.seen = list[tuple[float, ...]]()

    def alone(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call) -> Prediction:
        self.seen.append(tuple(x_t.flatten(1)[:, 0].tolist()))
        if any(row < 0 for row in self.seen[-1]):
            raise ValueError("a negative number")
        assert call.kv is not None
        kv = tuple((k + x_t.mean(), v) for k, v in call.kv.layers)
        return Prediction(x_t, "x0", x_t, t, tiny_model().card.path, kv)


def view(first: float = 0.0, clips: int = 1, slots: int = 2, start: int = 4) -> KVView:
    k = first + torch.arange(clips * 2 * slots * 3).double().reshape(clips, 1, 2 * slots, 3)
    return KVView(((k, -k),), torch.arange(slots), torch.tensor(start))


def asked(network: object, number: float, clips: int = 1, **call: object) -> Asked:
    x = number + torch.arange(clips).double()[:, None, None, None, None].expand(-1, 1, 2, 1, 1)
    cond = Cond(torch.zeros(clips, 3, 4), torch.ones(clips, 3, dtype=torch.bool))
    return Asked(network, x, torch.full((clips,), number), cond, Call(**({"kv": view(number, clips)} | call)))  # type: ignore[arg-type]


def asking(ask: Asked) -> Callable[[], Prediction]:
    from fewstep.streaming.together import answered

    return lambda: answered(ask)


def test_each_gets_its_own_rows() -> None:
    network, together = Sums(), Together(3)
    asks = {"c": asked(network, 10.0, 2), "a": asked(network, 20.0), "b": asked(network, 30.0, 3)}
    lanes = together({name: asking(ask) for name, ask in asks.items()})
    assert network.seen == [(20.0, 30.0, 31.0, 32.0, 10.0, 11.0)]  # by name: the same rows in every call
    for name, ask in asks.items():
        prediction = lanes[name].done.result()
        assert torch.equal(prediction.raw, ask.x_t) and prediction.x_t is ask.x_t and prediction.t is ask.t
        assert prediction.kv is not None and torch.equal(prediction.kv[0][1], ask.call.kv.layers[0][1])  # type: ignore[union-attr]


def test_views_are_joined_each_at_its_own_positions() -> None:
    young, old = view(0.0, 2, start=4), replace(view(5.0, 1, start=9), positions=torch.tensor([[7, 8]]))
    whole = joined([replace(v, frame=v.start + 1, readable=v.positions > 0) for v in (young, old)], [2, 1])
    assert whole.positions.tolist() == [[0, 1], [0, 1], [7, 8]] and whole.start.tolist() == [4, 4, 9]
    assert whole.frame is not None and whole.frame.tolist() == [5, 5, 10]
    assert whole.readable is not None and whole.readable.tolist() == [[False, True], [False, True], [True, True]]
    assert torch.equal(whole.layers[0][1], torch.cat([young.layers[0][1], old.layers[0][1]]))
    states = [replace(v, states=(torch.full((n, 1), float(n)),)) for v, n in ((young, 2), (old, 1))]
    assert joined(states, [2, 1]).states[0].tolist() == [[2.0], [2.0], [1.0]]  # type: ignore[index]


def test_what_calls_of_one_batch_have_in_common() -> None:
    network, one = Sums(), asked(Sums(), 0.0)
    one = asked(network, 1.0)
    assert (
        one.shape is not None
        and one.shape == asked(network, 2.0, 3).shape == asked(network, 2.0, step=1, steps=4).shape
    )
    assert one.shape == asked(network, 2.0, kv=view(start=9)).shape == asked(network, 1.0, rng=Seeds((1,))).shape
    others = [
        asked(Sums(), 1.0), asked(network, 1.0, kv=view(slots=3)), asked(network, 1.0, branch="both"),
        asked(network, 1.0, mutual=True), asked(network, 1.0, unmixed=(1,)), asked(network, 1.0, kv=replace(view(), weight=0.5)),
        asked(network, 1.0, kv=replace(view(), readable=torch.ones(2, dtype=torch.bool))),
        asked(network, 1.0, kv=replace(view(), states=())), asked(network, 1.0, kv=replace(view(), compresses=2)),
        replace(one, t=torch.zeros(1, 2)), replace(one, x_t=one.x_t.float()), replace(one, x_t=one.x_t[:, :, :1]),
        replace(one, cond=replace(one.cond, text=torch.zeros(1, 5, 4))),
    ]  # fmt: skip
    shapes = [one.shape, *(other.shape for other in others)]
    assert None not in shapes and len(set(shapes)) == len(shapes)
    alone = (
        {"kv": None}, {"causal": Causal((1, 1))}, {"negative": Negative(one.cond, lambda a, b: a)}, {"shared": object()},
        {"runner": lambda block, state, place: state},
    )  # fmt: skip
    assert all(asked(network, 1.0, **options).shape is None for options in alone)


def test_a_network_that_looks_up_frames_by_number_is_called_for_one_age() -> None:
    """Such as those of an image. Others may be of any age."""
    network, placed = Sums(), Sums()
    placed.by_age = True
    ages = [[asked(one, 1.0, kv=view(start=n)).shape for n in (4, 4, 8)] for one in (network, placed)]
    assert ages[0][0] == ages[0][1] == ages[0][2] and ages[1][0] == ages[1][1] != ages[1][2]
    plain, image = (Wan(config=dict(wan_transformer(in_channels=n).config), pattern=BlockCausal()) for n in (4, 12))
    begun = Wan(config=dict(wan_transformer().config), pattern=BlockCausal(), first_frame=True)
    assert [backbone.by_age for backbone in (plain, image, begun)] == [False, True, True]
    assert tiny_model().reader.by_age is False


def test_networks_that_know_the_step_are_called_for_one_step() -> None:
    contract = Contract(grid=Exact(grids=((1.0, 0.5, 0.0),)), steps=2, sampler=Renoise(), stream=WINDOW)
    model = tiny_model().transformed(Repatterned(pattern=BlockCausal(chunk=2, window=5, sink=1)), StepScales(steps=2))
    model = double(model.with_part("denoiser", model.denoiser, contract=contract))
    shaken(model.denoiser)
    alone = [session(model, prompt, seed, 4) for seed, prompt in enumerate((BALL, STAR))]
    company, seen = [Session(model, one.snapshot) for one in alone], batches(model)
    found = side_by_side(Together(2), 6, *company)
    assert seen.count(1) > 1 and 2 in seen  # the last step and the chunk that is remembered are of one step
    for one, mine in zip(alone, found, strict=True):
        for a, b in zip(mine, made(one, len(mine)), strict=True):
            close(a, b)


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_an_error_is_of_one_call(caplog: pytest.LogCaptureFixture) -> None:
    network, together = Sums(), Together(3)
    with caplog.at_level(logging.WARNING):
        lanes = together({name: asking(asked(network, x)) for name, x in (("a", 1.0), ("b", -2.0), ("c", 3.0))})
    assert "for 3 streams failed (a negative number)" in caplog.text
    assert network.seen == [(1.0, -2.0, 3.0), (1.0,), (-2.0,), (3.0,)]
    with pytest.raises(ValueError, match="a negative number"):
        lanes["b"].done.result()
    assert lanes["a"].done.result().raw.mean() == 1 and lanes["c"].done.result().raw.mean() == 3
    again = together({name: asking(asked(network, x)) for name, x in (("a", 1.0), ("b", 2.0))})
    assert again["b"].done.result().raw.mean() == 2


def test_numbers_that_are_not_finite_stay_in_their_stream() -> None:
    model = double(streaming_model(WINDOW))
    sound, ill = session(model, BALL, 0, 4), session(model, STAR, 1, 4)
    cond, uncond = model.conditions([STAR])
    ill = Session(model, ill.snapshot, conditions=(replace(cond, text=cond.text * torch.nan), uncond))
    company = Session(model, sound.snapshot)
    found = side_by_side(Together(2), 5, ill, company)
    assert not found[0][0].isfinite().any()
    for a, b in zip(found[1], made(sound, len(found[1])), strict=True):
        close(a, b)
    assert len(found[1]) == 2 and all(k.isfinite().all() for k, _ in company.snapshot.memory.layers)


def test_a_stream_that_is_given_up_amid_calls_leaves_no_trace() -> None:
    model, together = double(streaming_model(WINDOW)), Together(2)
    alone = [session(model, prompt, seed, 4) for seed, prompt in enumerate((BALL, STAR))]
    gone, stays = (Session(model, one.snapshot) for one in alone)
    before, (leaving, staying) = gone.snapshot, (Calls(gone), Calls(stays))
    together({"leaving": leaving, "staying": staying})
    assert leaving.steps is not None
    leaving.steps.close()
    assert gone.snapshot is before
    again = Calls(gone)
    for _ in range(2):
        together({"again": again, "staying": staying})
    for work, one in ((again, alone[0]), (staying, alone[1])):
        close(work.latents[0], next(one.take(1)))


def test_the_first_is_called_before_those_of_another_shape() -> None:
    network, ends = Sums(), list[str]()

    def work(name: str, *asks: Asked) -> None:
        for ask in asks:
            asking(ask)()
        ends.append(name)

    other = partial(asked, network, kv=view(slots=3))
    lanes = Together(3)({
        "z": partial(work, "z", asked(network, 1.0)),
        "a": partial(work, "a", other(2.0), other(3.0)),
        "b": partial(work, "b", other(4.0)),
        })  # fmt: skip
    assert network.seen == [(1.0,), (2.0, 4.0), (3.0,)] and ends == ["z", "b", "a"]
    assert lanes["a"].shape == other(0.0).shape != lanes["z"].shape


def test_an_interrupt_ends_every_piece_of_work() -> None:
    class Interrupted(Sums):
        def alone(self, *_: object) -> Prediction:  # type: ignore[override]
            raise KeyboardInterrupt

    ended, network, together = list[str](), Interrupted(), Together(2)

    def work(name: str) -> None:
        try:
            asking(asked(network, 1.0))()
        finally:
            ended.append(name)

    with pytest.raises(KeyboardInterrupt):
        together({"a": partial(work, "a"), "b": partial(work, "b")})
    together._pool.shutdown(wait=True)
    assert sorted(ended) == ["a", "b"]


def test_more_work_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1 pieces of work"):
        Together(1)({"a": lambda: 1, "b": lambda: 2})
    with pytest.raises(ValueError, match="at least 1 stream"):
        Together(0)
    assert Together(1)({"a": lambda: 1})["a"].done.result() == 1


def test_nothing_is_kept_of_streams_that_are_forgotten() -> None:
    network, together = Sums(), Together(2)
    together({name: asking(asked(network, 1.0)) for name in "ab"})
    assert together._views is not None
    together.forget()
    assert together._views is None and together._constants is None
