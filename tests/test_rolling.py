"""A rolling window: every chunk sees all times in order, in one call per tick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import Dense, KVCache
from fewstep.core import Call, Cond, KVView, Seeds
from fewstep.diffusion import CFG, Contract, Euler, Exact, Heun, Renoise, Sampler, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.streaming import Chunks, Rolling, Session
from support_engine import tiny_model
from test_streaming import PROMPTS, made

SHAPE = (4, 8, 8)
THREE = (1.0, 0.7, 0.4, 0.0)


def rolling_model(
    stream: Stream, times: tuple[float, ...], sampler: Sampler = Renoise(), guidance: CFG = CFG()
) -> VideoModel:
    model = tiny_model()
    grid = Exact(grids=(times,), otherwise=Shifted())
    contract = Contract(sampler=sampler, steps=len(times) - 1, grid=grid, guidance=guidance, stream=stream)
    return model.with_part("denoiser", repattern(model.denoiser, Dense()), contract=contract)


@dataclass
class Heard:
    """A denoiser that keeps a list of its calls."""

    network: Any
    calls: list[tuple[list[float], int]] = field(default_factory=list)

    @property
    def path(self) -> Any:
        return self.network.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Any:
        times = (t[0] if t.ndim == 2 else t[0].expand(x_t.shape[2])).tolist()
        self.calls.append(([round(time, 3) for time in times], int(call.kv.start) if call.kv else 0))
        return self.network(x_t, t, cond, call)

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.network.recall(memory, x_t, call)


def rolled(model: VideoModel, count: int, network: Any = None) -> list[Tensor]:
    window = Rolling(chunks=Chunks.of(network or model.reader, model.card.contract))
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
        first = window.tick(window.begin(), noise[0], cond, uncond, rng)
        done = window.tick(first, noise[1], cond, uncond, rng)
        x = torch.cat([first.window[0].x, noise[1]], 2)
        view = model.reader.recall(KVCache.empty(), x)
        whole = model.reader(x, torch.tensor([[0.6, 1.0]] * 2), cond, Call(kv=view)).kv
    assert done.memory.positions.tolist() == [0] and whole is not None
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
        (alone,), (chunk,) = rolled(model, 1), made(Session(model, PROMPTS), 1)
        assert torch.equal(alone, chunk)


def test_a_tick_leaves_the_one_before_as_it_was() -> None:
    model = rolling_model(Stream(window=3), THREE)
    window = Rolling(chunks=Chunks.of(model.reader, model.card.contract))
    (cond, uncond), rng, tick = model.conditions(PROMPTS), Seeds((0, 1)), window.begin()
    noise = [rng.fold(f"chunk/{i}").randn((2, 4, 1, 8, 8), "start") for i in range(5)]
    with torch.no_grad():
        for x in noise[:4]:
            tick = window.tick(tick, x, cond, uncond, rng)
        one, two = (window.tick(tick, noise[4], cond, uncond, rng) for _ in range(2))
        other = window.tick(tick, None, cond, uncond, rng)
    assert one.done is not None and two.done is not None and torch.equal(one.done, two.done)
    assert other.done is not None and not torch.equal(one.done, other.done) and len(other.window) == 1
    with pytest.raises(ValueError, match="nothing is in the window"):
        window.tick(window.begin(), None, cond, uncond, rng)


def test_what_cannot_roll_is_refused() -> None:
    model = rolling_model(Stream(), THREE, sampler=Heun())
    with pytest.raises(ValueError, match="Heun takes 5 calls for 3 steps"):
        Rolling(chunks=Chunks.of(model.reader, model.card.contract))
    model = rolling_model(Stream(steps=(3,)), THREE)
    with pytest.raises(ValueError, match=r"leave stream\.steps out"):
        Rolling(chunks=Chunks.of(model.reader, model.card.contract))
