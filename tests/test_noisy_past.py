"""History corruption: noise on the past in training, of a known size, on all but the sink, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.attention import Decaying, Int8Memory, KVCache, MovingSink, Retrieval, Window
from fewstep.core import Rng, Seeds
from fewstep.diffusion import Stream
from fewstep.methods import SelfForced, StreamingLong
from fewstep.methods.rollouts.noisy_past import NoisyPast
from fewstep.streaming import Session
from fewstep.streaming.blocks import Chunks
from test_long_streams import LONG, WINDOW, going_on
from test_self_forced import TWO, Heard, Late, Numbers, rolled_by
from test_streaming import PROMPTS, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
KEEPS = {
    "window": Window(window=4, sink=1), "moving": MovingSink(window=4, sink=1), "rows": Decaying(half=1.0, sink=1),
    "chosen": Retrieval(frames=1, recent=1, sink=1), "int8": Int8Memory(keep=Window(window=4, sink=1)),
}  # fmt: skip


def remembered(stream: Stream, chunks: int) -> tuple[Any, KVCache]:
    model = streaming_model(stream)
    session = Session(model, PROMPTS)
    list(session.take(chunks))
    return model, session.snapshot.memory


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("chunks", [2, 6])
def test_all_but_the_sink_is_read_with_noise_of_the_stated_size(keep: Any, chunks: int) -> None:
    model, memory = remembered(Stream(memory=keep), chunks)
    x = torch.zeros(2, 4, 1, 8, 8)
    clean = model.denoiser.recall(memory, x)
    noisy = NoisyPast(model.denoiser, 0.5, Seeds((5, 6))).recall(memory, x)
    read, per_frame = memory.read(), clean.layers[0][0].shape[2] // clean.slots
    slot_of = torch.arange(clean.slots).repeat_interleave(per_frame) if read.rows is None else read.rows[:, 0]
    frame = read.positions.expand(2, -1)[0][slot_of] if read.positions.ndim == 1 else read.positions[0][slot_of]
    for pair, other in zip(clean.layers, noisy.layers, strict=True):
        for before, after in zip(pair, other, strict=True):
            moved = after - before
            assert not moved[:, :, frame < 1].any(), "the sink, and slots without a frame"
            size = before[:, :, frame >= 1].square().mean().sqrt()
            assert float(moved[:, :, frame >= 1].std() / size) == pytest.approx(0.5, rel=0.15)
    assert torch.equal(clean.positions, noisy.positions) and torch.equal(clean.start, noisy.start)


def test_every_layer_keys_and_values_clips_and_chunks_have_noise_of_their_own() -> None:
    model, memory = remembered(Stream(), 2)
    x = torch.zeros(2, 4, 1, 8, 8)
    clean = model.denoiser.recall(memory, x)
    found = []
    for name in ("a", "b"):
        noisy = NoisyPast(model.denoiser, 0.5, Seeds((5, 6)).fold(name)).recall(memory, x)
        for pair, other in zip(clean.layers, noisy.layers, strict=True):
            for before, after in zip(pair, other, strict=True):
                found += [((after - before) / before.square().mean().sqrt())[row].flatten() for row in (0, 1)]
    for i, one in enumerate(found):
        for another in found[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, another]))[0, 1])) < 0.2


def test_no_noise_is_today_bit_for_bit_and_nothing_is_wrapped() -> None:
    model = streaming_model(WINDOW)
    rollout = SelfForced(stream=WINDOW, grids=TWO, exit="last")
    rolled = rolled_by(model.denoiser, model, replace(rollout, history_noise=0.0), Numbers((0, 1)), 6)
    assert torch.equal(rolled.x0, torch.cat(list(Session(model, PROMPTS).take(6)), 2))
    noisy = rolled_by(model.denoiser, model, replace(rollout, history_noise=0.5), Numbers((0, 1)), 6)
    assert torch.equal(noisy.x0[:, :, 0], rolled.x0[:, :, 0]), "the first chunk has no past"
    assert torch.equal(noisy.x0[:, :, 1], rolled.x0[:, :, 1]), "the second has only the sink"
    assert not torch.equal(noisy.x0[:, :, 2], rolled.x0[:, :, 2])


def test_serving_is_untouched() -> None:
    """A student that was trained with it is sampled without: the contract says nothing of it."""
    for rollout in (SelfForced(stream=WINDOW), StreamingLong(stream=WINDOW)):
        contract = streaming_model(WINDOW).card.contract
        assert replace(rollout, history_noise=0.5).contract(contract) == rollout.contract(contract)


def test_what_comes_before_the_stretch_is_read_as_in_sampling() -> None:
    model = streaming_model(WINDOW)
    rollout = SelfForced(stream=WINDOW, grids=TWO, exit="last", clips=2, overlap=2, history_noise=0.5)
    rolled = rolled_by(model.denoiser, model, rollout, Late((0, 1), stretch=2))
    whole = torch.cat(list(Session(model, PROMPTS).take(6)), 2)
    assert rolled.past is not None and torch.equal(rolled.past, whole[:, :, 2:4])
    assert not torch.equal(rolled.x0[:, :, 0], whole[:, :, 4])


def test_calls_of_a_chunk_read_the_same_noise_and_the_memory_has_none() -> None:
    model = streaming_model(Stream())
    heard = Heard(model.denoiser)
    rolled_by(heard, model, SelfForced(grids=TWO, exit="last", history_noise=0.5), Numbers((0, 1)), 3)
    second = heard.calls[3:6]
    assert len({id(call.kv.layers[0][0]) for _, _, _, call, _ in second if call.kv is not None}) == 1
    loop = Chunks.of(model.denoiser, model.card.contract)
    memory, cond = loop.begin(), model.conditions(PROMPTS)[0]
    for index in range(2):
        noise = Rng(0).randn((2, 4, 1, 8, 8), f"{index}")
        before = memory
        with torch.no_grad():
            *_, last = replace(loop, network=NoisyPast(model.denoiser, 0.5, Rng(index))).chunk(
                memory, noise, cond, cond, Rng(index)
            )
        memory = last.memory
        if index:
            kept = memory.layers[0][0][:, :, : before.layers[0][0].shape[2]]
            assert torch.equal(kept, before.layers[0][0])


def test_a_stream_that_goes_on_has_it_too() -> None:
    model = streaming_model(WINDOW)
    plain, _ = going_on(model, replace(LONG, switch=False), 2)
    noisy, _ = going_on(model, replace(LONG, switch=False, history_noise=0.5), 2)
    assert torch.equal(plain[0].x0[:, :, 0], noisy[0].x0[:, :, 0]) and not torch.equal(plain[1].x0, noisy[1].x0)


def test_it_needs_no_call_of_its_own() -> None:
    model, counts = streaming_model(Stream()), []
    for scale in (0.0, 0.5):
        heard = Heard(model.denoiser)
        rolled_by(heard, model, SelfForced(grids=TWO, exit="last", history_noise=scale), Numbers((0, 1)), 3)
        counts.append(len(heard.calls))
    assert counts[0] == counts[1]
