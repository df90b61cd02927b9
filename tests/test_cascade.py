"""Block Cascading: a chunk starts before the one before it is finished, and reads it as far as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Call, Seeds
from fewstep.diffusion import CFG, Contract, Stream
from fewstep.models import VideoModel
from fewstep.streaming import Chunks, Rolling, Session, cascaded
from test_rolling import Heard, one_by_one, rolling_model
from test_streaming import PROMPTS, made

pytestmark = pytest.mark.usefixtures("single_thread")
FOUR, TWO = (1.0, 0.8, 0.6, 0.3, 0.0), (1.0, 0.6, 0.0)


def serial(stream: Stream, times: tuple[float, ...] = FOUR, guidance: CFG = CFG()) -> VideoModel:
    return one_by_one(rolling_model(replace(stream, rolling=1), times, guidance=guidance))


def cascade(model: VideoModel, after: int) -> VideoModel:
    return model.with_card(contract=cascaded(model.card.contract, after))


@pytest.mark.parametrize("stream", [Stream(), Stream(window=3, sink=1), Stream(chunks=(2,), commit="last")], ids=str)
def test_without_overlap_it_is_the_stream_bit_for_bit(stream: Stream) -> None:
    model = serial(stream)
    assert cascaded(model.card.contract, 4) == model.card.contract
    chunks, alike = made(Session(model, PROMPTS), 4), made(Session(cascade(model, 4), PROMPTS), 4)
    assert all(torch.equal(a, b) for a, b in zip(chunks, alike, strict=True))


def test_a_chunk_starts_after_so_many_steps_of_the_one_before() -> None:
    model = cascade(serial(Stream(chunks=(2,), commit="last")), 2)
    heard = Heard(model.reader)
    with torch.no_grad():
        list(
            Rolling(chunks=Chunks.of(heard, model.card.contract)).take(
                3, (4, 8, 8), *model.conditions(PROMPTS), Seeds((0, 1))
            )
        )
    assert [times[::2] for times, _ in heard.calls] == [
        [1.0], [0.8], [0.6, 1.0], [0.3, 0.8], [0.6, 1.0], [0.3, 0.8], [0.6], [0.3],
    ]  # fmt: skip


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "stream", [Stream(), Stream(window=3, sink=1), Stream(chunks=(2,), window=4)], ids=["all", "sink", "chunks"]
)
def test_a_chunk_reads_the_one_before_as_far_as_it_is(stream: Stream, guidance: CFG) -> None:
    """By hand, one call per chunk: the second of two chunks in flight reads what the first one's call has just left, as if that
    were remembered. Each reads as many frames as its window has, and never a later one."""
    model = cascade(serial(stream, TWO, guidance), 1)
    network, (cond, uncond), count = model.reader, model.conditions(PROMPTS), 4
    contract, rng, length = model.card.contract, Seeds((0, 1)), stream.chunks[0]
    noise = [rng.fold(f"chunk/{i}").randn((2, 4, length, 8, 8), "start") for i in range(count)]

    def call(x: Tensor, time: float, memory: KVCache) -> tuple[Tensor, KVCache]:
        view = network.recall(memory, x)
        out = contract.guidance(network, x, torch.full((2,), time), cond, uncond, Call(kv=view))
        return out.x0, memory.commit(out.kv or (), length)

    done, memory = list[Tensor](), Chunks.of(network, contract).begin()
    with torch.no_grad():
        x0, _ = call(noise[0], 1.0, memory)
        for index in range(count):
            half = network.path.add_noise(
                x0, rng.fold(f"chunk/{index}").randn(x0.shape, "renoise/0"), torch.full((2,), 0.6)
            )
            finished, left = call(half, 0.6, memory)
            if index + 1 < count:
                x0, _ = call(noise[index + 1], 1.0, left)
            done.append(finished)
            _, memory = call(finished, 0.0, memory)
    clip = model.latents(PROMPTS, num_frames=count * length)
    torch.testing.assert_close(clip, torch.cat(done, 2), atol=2e-5, rtol=1e-4)
    alone = torch.cat(made(Session(serial(stream, TWO, guidance), PROMPTS), count), 2)
    torch.testing.assert_close(clip[:, :, :length], alone[:, :, :length], atol=1e-5, rtol=1e-4)
    assert (clip[:, :, length:] - alone[:, :, length:]).abs().max() > 1e-4


def test_a_cascade_is_restored_bit_for_bit() -> None:
    model = cascade(serial(Stream(window=4, sink=1)), 1)
    session = Session(model, PROMPTS)
    made(session, 3)
    paused = session.snapshot
    rest = made(session, 3)
    assert all(torch.equal(a, b) for a, b in zip(made(Session(model, paused), 3), rest, strict=True))
    whole, clip = made(Session(model, PROMPTS), 6), model.latents(PROMPTS, num_frames=6)
    torch.testing.assert_close(clip, torch.cat(whole, 2), atol=1e-5, rtol=1e-4)  # later chunks change nothing


def test_what_cannot_be_cascaded_is_refused() -> None:
    contract = serial(Stream()).card.contract
    with pytest.raises(ValueError, match="after 1, 2, 4 of 4 steps of the one before, not after 3"):
        cascaded(contract, 3)
    assert cascaded(contract, 3, steps=6).stream == Stream(rolling=2, mutual=False)
    for stream, said in (
        (None, "whole clips"), (Stream(rolling=2), "rolling=2"), (Stream(steps=(4,)), r"steps=\(4,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            cascaded(replace(contract, stream=stream), 2)
    with pytest.raises(ValueError, match="one position, and this stream has positions 'window'"):
        Session(cascade(serial(Stream(window=4, positions="window")), 2), PROMPTS)
    unrolled: Any = Contract()
    with pytest.raises(ValueError, match="can be cascaded"):
        cascaded(unrolled, 1)
