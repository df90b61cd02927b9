"""A rollout of a rolling window is the session's, and its trained windows tile the clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.attention import Retrieval
from fewstep.core import Rng
from fewstep.diffusion import CFG, Contract, Stream
from fewstep.engine import train
from fewstep.methods import DMD2, Rolled, RollingForced, SelfForced
from fewstep.models import VideoModel
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from test_self_forced import Heard, Numbers, rolled_by
from test_streaming import PROMPTS

pytestmark = pytest.mark.usefixtures("single_thread")
THREE, FOUR = ((1.0, 0.7, 0.4),), ((1.0, 0.8, 0.6, 0.3),)
STREAMS = {
    "window": (Stream(rolling=3, window=5, sink=1), THREE), "last": (Stream(rolling=3, commit="last"), THREE),
    "two": (Stream(rolling=2, chunks=(2,), window=6, positions="sink", sink=2), FOUR),
}  # fmt: skip


@dataclass(frozen=True)
class Residue(Numbers):
    """The noise of a session, and this residue."""

    residue: int = 0

    def integer(self, name: str, high: int) -> int:
        return min(self.residue, high - 1) if name == "residue" else 0


def rolling_model(rollout: RollingForced) -> VideoModel:
    model = tiny_model()
    return model.with_part("denoiser", model.denoiser, contract=rollout.contract(Contract()))


def trained(rollout: RollingForced, rng: Any, frames: int = 6) -> tuple[Rolled, Heard, VideoModel]:
    model = rolling_model(rollout)
    heard = Heard(model.denoiser.requires_grad_(True))
    return rolled_by(heard, model, rollout, rng, frames), heard, model  # type: ignore[arg-type]


@pytest.mark.parametrize(("stream", "grids"), STREAMS.values(), ids=STREAMS)
def test_its_calls_are_those_of_a_session_bit_for_bit(stream: Stream, grids: Any) -> None:
    """Whatever carries gradient; and the predictions of the last steps are the clip."""
    rollout, steps = RollingForced(stream=stream, grids=grids, plain=0.0), len(grids[0])
    sampled = list[Any]()
    model = rolling_model(rollout)
    model.denoiser.register_forward_hook(lambda _, inputs, out: sampled.append((*inputs[:2], out.x0)))
    clip = model.latents(PROMPTS, num_frames=6)
    last = 0
    for residue in range(steps):
        rolled, heard, _ = trained(rollout, Residue((0, 1), residue=residue))
        for (x_t, t, x0), (_, own_x, own_t, _, own_x0) in zip(sampled, heard.calls, strict=True):
            assert torch.equal(x_t, own_x) and torch.equal(t, own_t) and torch.equal(x0, own_x0)
        final = rolled.t[0] == grids[0][-1]
        assert torch.equal(rolled.x0[:, :, final].detach(), clip[:, :, final])
        last += int(final.sum())
    assert last == 6  # over all residues each frame is once what the clip is


@pytest.mark.parametrize(("stream", "grids"), STREAMS.values(), ids=STREAMS)
def test_trained_windows_tile_the_clip(stream: Stream, grids: Any) -> None:
    """The sum of the gradient masks is one in every frame, for every residue; each step of a chunk is trained once in T."""
    steps, times = len(grids[0]), list[Any]()
    for residue in range(steps):
        rolled, heard, _ = trained(
            RollingForced(stream=stream, grids=grids, plain=0.0), Residue((0, 1), residue=residue), 8
        )
        mask, length = torch.zeros(8), stream.length(0)
        for grad, x_t, t, call, x0 in heard.calls:
            if grad:
                assert call.kv is not None and not any(x.requires_grad for layer in call.kv.layers for x in layer)
                begin = int(call.kv.start)
                frames = slice(begin, begin + x_t.shape[2])
                mask[frames] += 1
                assert torch.equal(rolled.x0[:, :, frames], x0) and torch.equal(rolled.x_t[:, :, frames], x_t)
                assert torch.equal(rolled.t[:, frames], t if t.ndim == 2 else t[:, None].expand(-1, x_t.shape[2]))
                assert not x_t.requires_grad
        assert torch.equal(mask, torch.ones(8)) and rolled.exit == len(rolled.before)
        for visit in rolled.before:
            assert not visit.x0.requires_grad
        times.append(rolled.t[0, ::length])
    assert all(sorted(chunk.tolist(), reverse=True) == pytest.approx(grids[0]) for chunk in torch.stack(times, 1))


def test_the_gradient_of_a_window_is_that_of_its_own_call() -> None:
    stream, grids = STREAMS["window"]
    rolled, heard, model = trained(RollingForced(stream=stream, grids=grids, plain=0.0), Residue((0, 1), residue=1))
    weights, cond = list(model.denoiser.parameters()), model.conditions(PROMPTS)[0]
    for _, x_t, t, call, _ in (made for made in heard.calls if made[0]):
        assert call.kv is not None
        frames = slice(int(call.kv.start), int(call.kv.start) + x_t.shape[2])
        own = torch.autograd.grad(rolled.x0[:, :, frames].square().sum(), weights, retain_graph=True, allow_unused=True)
        alone = model.denoiser(x_t, t, cond, call).x0.square().sum()
        for a, b in zip(own, torch.autograd.grad(alone, weights, allow_unused=True), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-7, rtol=1e-5))


@pytest.mark.parametrize("commit", ["clean", "last"])
def test_with_one_step_it_is_self_forcing(commit: Any) -> None:
    """Bit for bit, with its gradient."""
    stream, found = Stream(chunks=(2,), commit=commit, window=4), list[Any]()
    one = ((1.0,),)
    for rollout in (
        RollingForced(stream=replace(stream, rolling=1), grids=one, plain=0.0), SelfForced(stream=stream, grids=one),
    ):  # fmt: skip
        rolled, _, model = trained(rollout, Rng(3))  # type: ignore[arg-type]
        weights = list(model.denoiser.parameters())
        grads = torch.autograd.grad(rolled.x0.square().sum(), weights, allow_unused=True)
        times = rolled.t if rolled.t.ndim == 2 else rolled.t[:, None].expand(-1, 6)
        found.append([rolled.x0, rolled.x_t, times, rolled.noise, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_coin_chooses_the_other_kind_of_rollout() -> None:
    """All processes throw the same one, because the kinds differ in their number of calls."""
    stream, grids = STREAMS["window"]
    rollout = RollingForced(stream=stream, grids=grids, plain=0.25)
    model = rolling_model(rollout)
    serial = SelfForced(stream=replace(stream, rolling=0), grids=grids)
    plain = 0
    for step in range(24):
        rng = Rng(1, step, place=step % 2)
        rolled = rolled_by(model.denoiser, model, rollout, rng, 3)  # type: ignore[arg-type]
        alone = rolled_by(model.denoiser, model, serial, rng, 3)
        is_plain = rng.at(place=5).integer("coin", 10**9) < 0.25 * 10**9
        assert torch.equal(rolled.x0, alone.x0) == is_plain and (rolled.grid == ()) != is_plain
        plain += is_plain
    assert 2 <= plain <= 11
    assert rollout.calls == 0.25 * (2 + 1) + 0.75 * (3 + 1) and rollout.work == rollout.calls + 2


def test_its_student_rolls(tmp_path: Path) -> None:
    rollout = RollingForced(stream=Stream(rolling=2, chunks=(2,)), grids=((1.0, 0.5),), shift=3.0)
    contract = rollout.contract(Contract(guidance=CFG(scale=4.0)))
    assert contract.stream == rollout.stream and contract.times() == (1.0, 0.75, 0.0) and not contract.guidance.active
    method = DMD2(critic_updates=1, rollout=replace(rollout, plain=0.0))
    student = train(tiny_model(), method, WorldClips(num_frames=FRAMES), small(steps=1), tmp_path, quiet=True)
    again = VideoModel.from_pretrained(tmp_path / "student")
    assert again.card.contract.stream == rollout.stream
    assert torch.equal(again.latents(PROMPTS), student.latents(PROMPTS))


def test_what_cannot_roll_is_refused() -> None:
    for given in ({"grids": (*THREE, *FOUR)}, {"stream": Stream()}):
        with pytest.raises(ValueError, match="one list of times and at least one chunk"):
            RollingForced(**given)
    with pytest.raises(ValueError, match="3 steps cannot be shared by the 2 chunks"):
        RollingForced(stream=Stream(rolling=2), grids=THREE)
    with pytest.raises(ValueError, match="remembers by Retrieval"):
        RollingForced(stream=Stream(rolling=3, memory=Retrieval()), grids=THREE)
    with pytest.raises(
        ValueError, match="denoises 3 chunks at once, and this rollout one chunk after the other; take RollingForced"
    ):
        SelfForced(stream=Stream(rolling=3))
