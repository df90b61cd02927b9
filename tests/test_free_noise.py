"""FreeNoise: later frames start from the noise of earlier ones, in another order, in training as in serving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core import Rng, Seeds
from fewstep.core.build import build, dump
from fewstep.diffusion import FreeNoise, Stream
from fewstep.methods import RollingForced, SelfForced
from fewstep.streaming import Session
from fewstep.streaming.noise import start_noise
from test_rolling_forced import Residue, trained
from test_self_forced import TWO, Numbers, rolled_by
from test_streaming import PROMPTS, made, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
SIZE = (2, 4, 8, 8)
NOISE = FreeNoise(window=4, stride=2)


def noise_of(stream: Stream, chunks: int, rng: Any = None) -> Tensor:
    return torch.cat([start_noise(stream, i, SIZE, rng or Seeds((0, 1))) for i in range(chunks)], 2)


@pytest.mark.parametrize("chunks", [(1,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize("noise", [NOISE, FreeNoise(window=6, stride=3), FreeNoise(window=4, stride=1)], ids=str)
def test_every_frame_has_the_noise_of_one_of_the_first(noise: FreeNoise, chunks: tuple[int, ...]) -> None:
    """Also where chunks, blocks and the window begin at different frames; the first ones are those of a stream without it."""
    whole = noise_of(Stream(chunks=chunks, noise=noise), 12)
    first = noise_of(Stream(chunks=chunks), 12)[:, :, : noise.window]
    assert torch.equal(whole[:, :, : noise.window], first)
    for frame in range(whole.shape[2]):
        same = [torch.equal(whole[:, :, frame], first[:, :, i]) for i in range(noise.window)]
        assert same == [i == noise.source(frame) for i in range(noise.window)]


def test_a_window_has_every_noise_once_and_blocks_change_their_order() -> None:
    noise = FreeNoise()
    sources = [noise.source(frame) for frame in range(160)]
    for begin in range(0, 144, 4):
        assert sorted(sources[begin : begin + 16]) == list(range(16))
        assert {s // 4 for s in sources[begin : begin + 4]} == {begin // 4 % 4}
    orders = {tuple(s % 4 for s in sources[begin : begin + 4]) for begin in range(0, 160, 4)}
    assert len(orders) > 8  # of 24
    assert sources == [FreeNoise().source(frame) for frame in range(160)]


def test_noise_is_normal() -> None:
    """Over seeds: any frame by itself."""
    stream = Stream(noise=NOISE)
    drawn = torch.cat([start_noise(stream, 9, (50, 4, 8, 8), Rng(seed)) for seed in range(8)])
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01 and abs((drawn**4).mean() - 3) < 0.06


@pytest.mark.parametrize(
    "stream", [Stream(chunks=(2,), noise=NOISE), Stream(window=3, noise=NOISE)], ids=["chunks", "window"]
)
def test_training_and_serving_start_from_the_same(stream: Stream) -> None:
    model = streaming_model(stream)
    rolled = rolled_by(model.denoiser, model, SelfForced(stream=stream, grids=TWO, exit="last"), Numbers((0, 1)), 8)
    session = Session(model, PROMPTS)
    chunks = made(session, len(stream.lengths(8)))
    assert torch.equal(rolled.x0.detach(), torch.cat(chunks, 2))
    plain = made(Session(streaming_model(Stream(chunks=stream.chunks, window=stream.window)), PROMPTS), len(chunks))
    assert torch.equal(plain[0], chunks[0]) and not torch.equal(plain[-1], chunks[-1])
    assert rolled.noise is not None and torch.equal(rolled.noise, noise_of(stream, len(chunks)))


def test_a_window_that_rolls_starts_from_the_same() -> None:
    rollout = RollingForced(stream=Stream(rolling=2, noise=NOISE), grids=((1.0, 0.5),), plain=0.0)
    rolled, _, model = trained(rollout, Residue((0, 1), residue=1), 8)
    clip, last = model.latents(PROMPTS, num_frames=8), rolled.t[0] == 0.5
    assert last.any() and torch.equal(rolled.x0[:, :, last].detach(), clip[:, :, last])
    assert rolled.noise is not None and torch.equal(rolled.noise, noise_of(rollout.stream, 8))


def test_it_travels_in_a_card() -> None:
    stream = Stream(noise=FreeNoise(window=8, stride=2))
    assert build(Stream, dump(stream)) == stream and build(Stream, {"noise": {"window": 8}}).noise == FreeNoise(
        window=8
    )
    with pytest.raises(ValueError, match="6 frames is not whole blocks of 4"):
        FreeNoise(window=6)
