"""A moving buffer: training times are those of the window that rolls, and nothing but the window is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core import Batch, Rng, Seeds
from fewstep.diffusion import CFG, Contract, Euler, Exact, LogitNormal, Shifted, Stream, Uniform
from fewstep.engine import train
from fewstep.methods import DMD2, FlowMatching, FromData, MovingBuffer, WholeClip
from fewstep.models import VideoModel
from fewstep.models.by_chunk import chunks_of
from fewstep.streaming import Chunks, Flying, Rolling, Session
from fewstep.world.data import WorldClips
from support_engine import small, tiny_model
from test_rolling import Heard
from test_streaming import PROMPTS, made

pytestmark = pytest.mark.usefixtures("single_thread")
BUFFER = Stream(chunks=(2,), rolling=4, commit="nothing")


def clips(frames: int = 8, count: int = 2) -> Tensor:
    return torch.randn(count, 4, frames, 8, 8, generator=torch.Generator().manual_seed(1))


def buffered(steps: int = 8, stream: Stream = BUFFER, guidance: CFG = CFG()) -> VideoModel:
    model = tiny_model()
    contract = Contract(grid=Shifted(shift=3.0), sampler=Euler(), steps=steps, guidance=guidance, stream=stream)
    return model.with_part("denoiser", model.denoiser, contract=contract)


def test_in_one_part_it_is_ordinary_flow_matching_bit_for_bit() -> None:
    """The same loss, and the same gradient."""
    model, x0, found = tiny_model(), clips(), list[Any]()
    weights = list(model.denoiser.requires_grad_(True).parameters())
    cond, uncond = model.conditions(PROMPTS)
    whole = Stream(chunks=(8,), rolling=1, commit="nothing")

    class Roles:
        student = model.denoiser

    for history in (WholeClip(), MovingBuffer(stream=whole, parts=(1,))):
        batch = Batch(cond=cond, uncond=uncond, latent_shape=(4, 8, 8, 8), x0=x0)
        (losses,) = FlowMatching(history=history).student_loss(Roles(), batch, Rng(3))  # type: ignore[arg-type]
        grads = torch.autograd.grad(losses["flow"], weights, allow_unused=True)
        found.append([losses["flow"], *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("density", [Uniform(), Uniform(shift=3.0), LogitNormal()], ids=["uniform", "shifted", "logit"])
def test_each_part_has_its_share_of_the_density(density: Any) -> None:
    """Part j of n is `1 / n` above the one before, in quantiles; all frames together have the density itself."""
    many = clips(count=512)
    for parts in (1, 2, 4, 8):
        stream = Stream(chunks=(8 // parts,), rolling=parts, commit="nothing")
        history = MovingBuffer(stream=stream, parts=(parts,))
        t = history.times(density, many, Rng(0))
        assert t.shape == ((512,) if parts == 1 else (512, 8)) and t.dtype == torch.float32
        u = Uniform().sample(512, Rng(0)).double()
        for frame in range(8):
            expected = density.at_quantile((frame * parts // 8 + u) / parts).float()
            torch.testing.assert_close(t if parts == 1 else t[:, frame], expected, atol=1e-5, rtol=0)
        drawn = density.sample(4096, Rng(1))
        for share in (0.25, 0.5, 0.75):
            assert abs(t.quantile(share) - drawn.quantile(share)) < 0.02


def test_a_mixture_draws_the_parts_of_each_clip() -> None:
    t = MovingBuffer(stream=BUFFER, parts=(1, 4, 8)).times(Uniform(), clips(count=300), Rng(0))
    assert (t.diff(dim=1) >= 0).all() and t.shape == (300, 8)
    levels = [len(set(row.tolist())) for row in t]
    assert set(levels) == {1, 4, 8} and all(60 < levels.count(n) < 140 for n in (1, 4, 8))


def test_a_full_window_has_times_of_the_training() -> None:
    """Four chunks of two steps each: in every call of a stream under way, the times are those of one quantile."""
    model = buffered(steps=8)
    heard = Heard(model.reader)
    list(
        Rolling(chunks=Chunks.of(heard, model.card.contract)).take(
            8, (4, 8, 8), *model.conditions(PROMPTS), Seeds((0, 1))
        )
    )
    full = [times for times, _ in heard.calls if len(times) == 8]
    assert len(full) == 2 * (8 - 3) and [len(times) for times, _ in heard.calls[:8]] == [2, 2, 4, 4, 6, 6, 8, 8]
    density = Uniform(shift=3.0)
    for call, times in enumerate(full):
        u = 1 - call % 2 / 2
        quantiles = torch.tensor([(frame // 2 + u) / 4 for frame in range(8)], dtype=torch.float64)
        assert times == pytest.approx(density.at_quantile(quantiles).tolist(), abs=1e-3)


@pytest.mark.parametrize("guidance", [CFG(), CFG(scale=3.0)], ids=["plain", "guided"])
def test_nothing_is_lost_and_nothing_is_remembered(guidance: CFG) -> None:
    """As many chunks leave as enter; the memory stays empty, and a call does not know how old its stream is."""
    model = buffered(guidance=guidance)
    window, (cond, uncond), rng = (
        Rolling(chunks=Chunks.of(model.reader, model.card.contract)),
        model.conditions(PROMPTS),
        Seeds((0, 1)),
    )
    memory, flying, entered, left = window.chunks.begin(), tuple[Flying, ...](), list[int](), list[int]()

    def start(index: int) -> Tensor:
        entered.append(index)
        return rng.fold(str(index)).randn((2, 4, 2, 8, 8), "start")

    with torch.no_grad():
        for index in range(7):
            before, old = memory, flying
            *_, last = window.chunk(memory, flying, start, cond, uncond, rng)
            assert last.memory is not None and not last.memory.layers and last.memory.start == 2 * (index + 1)
            memory, flying = last.memory, last.window
            left.append(index)
            assert entered == [*left, *(chunk.index for chunk in flying)] and len(flying) == 3
        young = replace(before, start=0 * before.start)
        pushed = (*old, Flying(9, start(9)))
        a, b = (window.tick(past, pushed, cond, uncond, rng).x for past in (before, young))
    assert torch.equal(a, b) and young.start == 0 != before.start


def test_a_session_of_it_is_restored_and_steered() -> None:
    session, others = Session(buffered(steps=4), PROMPTS), ["a green cross turns", "a yellow square falls"]
    first = made(session, 3)
    paused = session.snapshot
    rest = made(session, 2)
    assert all(torch.equal(a, b) for a, b in zip(made(Session(buffered(steps=4), paused), 2), rest, strict=True))
    assert paused.latents is not None and paused.latents.shape[2] == 2  # nothing is made anew from them
    again = Session(buffered(steps=4), paused)
    with pytest.raises(ValueError, match="remembers nothing, .*choose keep or lerp"):
        again.steer(others, "recache")
    again.steer(others)
    assert not torch.equal(made(again, 1)[0], rest[0]) and len(first) == 3


def test_steps_of_a_grid_are_shared_by_the_parts() -> None:
    """For few-step students: every part is at a step of its own share, and all have made as many of theirs."""
    history = MovingBuffer(stream=BUFFER, parts=(1, 4))
    step = history.index(8, clips(count=200), Rng(0))
    seen = {tuple(row.tolist()) for row in step}
    mixed = {tuple(2 * (3 - frame // 2) + k for frame in range(8)) for k in range(2)}
    assert seen == mixed | {(k,) * 8 for k in range(8)}
    with pytest.raises(ValueError, match=r"6 times cannot be shared by \(1, 4\) parts"):
        history.index(6, clips(), Rng(0))


def test_its_contract_rolls_in_steps_that_can_be_shared() -> None:
    history = MovingBuffer(stream=BUFFER, parts=(1, 4))
    assert history.contract(Contract(steps=50)).steps == 52 and history.contract(Contract(steps=48)).steps == 48
    assert history.contract(Contract()).stream == BUFFER
    few = Contract(steps=2, grid=Exact(grids=((1.0, 0.5, 0.0),), otherwise=Shifted()))
    with pytest.raises(ValueError, match="2 steps cannot be shared by 4 chunks"):
        history.contract(few)


def test_models_of_it_are_trained_and_stream(tmp_path: Path) -> None:
    """A teacher by flow matching, and a student of as many steps as chunks by distribution matching on data."""
    stream = Stream(chunks=(1,), rolling=4, commit="nothing")
    history = MovingBuffer(stream=stream, parts=(1, 2, 4))
    few = FromData(grids=((1.0, 0.75, 0.5, 0.25),), history=history)
    for name, method in {
        "teacher": FlowMatching(history=history),
        "student": DMD2(critic_updates=1, rollout=few),
    }.items():
        trained = train(tiny_model(), method, WorldClips(num_frames=4), small(steps=1), tmp_path / name, quiet=True)
        assert trained.card.contract.stream == stream
        chunks = made(Session(trained, PROMPTS), 2)
        assert len(chunks) == 2 and torch.cat(chunks, 2).isfinite().all()


def test_what_is_no_moving_buffer_is_refused() -> None:
    for stream, parts in ((BUFFER, (1, 8)), (Stream(chunks=(2,), rolling=4), (4,)),
                          (Stream(chunks=(1, 2), rolling=4, commit="nothing"), (4,))):  # fmt: skip
        with pytest.raises(ValueError, match="a moving buffer has chunks of one length"):
            MovingBuffer(stream=stream, parts=parts)
    with pytest.raises(ValueError, match="clips have 6 latent frames, and the buffer 8"):
        MovingBuffer(stream=BUFFER, parts=(4,)).times(Uniform(), clips(6), Rng(0))
    with pytest.raises(ValueError, match="leave out window=8"):
        Stream(commit="nothing", window=8)
    with pytest.raises(ValueError, match="train it with MovingBuffer"):
        chunks_of(BUFFER, 8)
