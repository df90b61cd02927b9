"""A rollout is the loop that serves, and the gradient of a chunk is that of one call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.attention import Importance, Int8Memory, KVCache, MovingSink, StateMemory, Window
from fewstep.core import Batch, Call, Cond, KVView, Rng, Seeds
from fewstep.diffusion import CFG, Contract, Shifted, Stream
from fewstep.engine import train
from fewstep.engine.views import View
from fewstep.methods import DMD2, Rolled, SelfForced
from fewstep.models import VideoModel
from fewstep.models.spread import Spread
from fewstep.streaming import Session
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from test_streaming import PROMPTS, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
STREAMS = {
    "all": Stream(), "chunks": Stream(chunks=(2,)), "sink": Stream(window=3, sink=1),
    "noised": Stream(commit="noised", context_time=0.2), "last": Stream(commit="last", window=2),
    "importance": Stream(memory=Importance(window=3)), "sink of means": Stream(memory=MovingSink(window=3, sink=1, decay=0.5)),
    "int8": Stream(memory=Int8Memory(keep=Window(window=4, sink=1)), positions="sink"),
    "state": Stream(memory=StateMemory(window=3, sink=1)),
}  # fmt: skip
ANEW = {
    "made anew": Stream(chunks=(2,), window=5, recompute=True, positions="window"),
    "made anew of noised": Stream(window=3, recompute=True, commit="noised", context_time=0.2),
}
TWO = ((1.0, 0.5),)


class Numbers(Seeds):
    """The noise of a session, and the first of all grids and exits."""

    def integer(self, name: str, high: int) -> int:
        return 0


@dataclass(frozen=True)
class Late(Numbers):
    """The same, with a stretch that begins later."""

    stretch: int = 0

    def integer(self, name: str, high: int) -> int:
        return min(self.stretch, high - 1) if name == "stretch" else 0


@dataclass
class Heard:
    """A student that keeps a list of its calls."""

    network: Any
    calls: list[tuple[bool, Tensor, Tensor, Call, Tensor]] = field(default_factory=list)

    @property
    def path(self) -> Any:
        return self.network.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Any:
        made = self.network(x_t, t, cond, call)
        self.calls.append((torch.is_grad_enabled(), x_t, t, call, made.x0))
        return made

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.network.recall(memory, x_t, call)


def rolled_by(network: Any, model: VideoModel, rollout: SelfForced, rng: Any, frames: int = 4) -> Rolled:
    cond, uncond = model.conditions(PROMPTS)
    return rollout(network, Batch(cond=cond, uncond=uncond, latent_shape=(4, frames, 8, 8)), rng, grad=True)


@pytest.mark.parametrize("stream", [*STREAMS.values(), *ANEW.values()], ids=[*STREAMS, *ANEW])
def test_at_the_last_exit_a_rollout_is_a_session_bit_for_bit(stream: Stream) -> None:
    """From the same noise: one loop makes what is trained on and what is served."""
    model = streaming_model(stream)
    rolled = rolled_by(model.denoiser, model, SelfForced(stream=stream, grids=TWO, exit="last"), Numbers((0, 1)), 6)
    chunks = list(Session(model, PROMPTS).take(len(stream.lengths(6))))
    assert torch.equal(rolled.x0.detach(), torch.cat(chunks, 2))
    assert torch.equal(rolled.x0.detach(), model.latents(PROMPTS, num_frames=6))


@pytest.mark.parametrize("commit", ["clean", "last"])
def test_one_call_of_each_chunk_carries_gradient(commit: Any) -> None:
    """The exit is the same in all chunks; what comes out there is the chunk that the next one reads."""
    stream = Stream(chunks=(2,), commit=commit)
    model, rollout, counts = streaming_model(stream), SelfForced(stream=stream), []
    model.denoiser.requires_grad_(True)
    for step in range(8):
        heard = Heard(model.denoiser)
        rolled = rolled_by(heard, model, rollout, Rng(0, step))
        calls = rolled.exit + 1
        each = calls + (commit == "clean")
        assert [grad for grad, *_ in heard.calls] == ([False] * rolled.exit + [True] + [False] * (each - calls)) * 2
        exits = [heard.calls[rolled.exit], heard.calls[each + rolled.exit]]
        assert torch.equal(rolled.x0, torch.cat([x0 for *_, x0 in exits], 2)) and rolled.x0.requires_grad
        assert torch.equal(rolled.x_t, torch.cat([x_t for _, x_t, *_ in exits], 2))
        assert len(rolled.before) == rolled.exit and torch.equal(rolled.t, torch.full((2,), rolled.grid[rolled.exit]))
        if commit == "clean":  # what is remembered is the prediction of the exit, at time 0
            _, x_t, t, *_ = heard.calls[each - 1]
            assert torch.equal(x_t, exits[0][-1]) and not t.any()
        counts.append(len(heard.calls) / 2)
    assert {1, 2, 3, 4} >= {count - (commit == "clean") for count in counts} and len(set(counts)) > 2
    assert rollout.calls == 2.5 + (commit == "clean") and rollout.work == rollout.calls + 2


@pytest.mark.parametrize("stream", [STREAMS["all"], STREAMS["sink"], STREAMS["last"]], ids=["all", "sink", "last"])
def test_the_gradient_of_a_chunk_is_that_of_its_own_call(stream: Stream) -> None:
    """Whatever else the loss has: chunks are tied by what is remembered, which carries none."""
    model = streaming_model(stream)
    weights = list(model.denoiser.requires_grad_(True).parameters())
    heard = Heard(model.denoiser)
    rolled = rolled_by(heard, model, SelfForced(stream=stream, grids=TWO, exit="last"), Rng(3), 5)
    exits = [call for call in heard.calls if call[0]]
    assert len(exits) == 5
    for index, (_, x_t, t, call, _) in enumerate(exits):
        assert call.kv is not None and not any(x.requires_grad for layer in call.kv.layers for x in layer)
        own = torch.autograd.grad(rolled.x0[:, :, index].square().sum(), weights, retain_graph=True, allow_unused=True)
        alone = model.denoiser(x_t, t, model.conditions(PROMPTS)[0], call).x0.square().sum()
        for a, b in zip(own, torch.autograd.grad(alone, weights, allow_unused=True), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize(
    "stream",
    [Stream(window=2), STREAMS["importance"], STREAMS["int8"], Stream(window=3, recompute=True)],
    ids=["window", "chosen", "int8", "made anew"],
)
def test_recomputed_blocks_read_what_they_read_before(stream: Stream) -> None:
    """Also after the window has moved on: blocks run anew in the backward pass, long after the rollout."""
    model = streaming_model(stream)
    weights, found = list(model.denoiser.requires_grad_(True).parameters()), []
    for checkpointing in (False, True):
        view = View("student", model.denoiser, Spread(checkpointing=checkpointing))
        rolled = rolled_by(view, model, SelfForced(stream=stream, grids=TWO, exit="last"), Rng(3), 7)
        found.append(torch.autograd.grad(rolled.x0.square().sum(), weights, allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "stream",
    [Stream(chunks=(2,), window=4), Stream(), STREAMS["last"], Stream(window=2, recompute=True)],
    ids=["window", "all", "last", "made anew"],
)
def test_a_stretch_of_a_longer_stream_is_that_of_a_session(stream: Stream) -> None:
    """Self-Forcing++: what comes before is made as in sampling, without gradient; any chunk may be the first."""
    model = streaming_model(stream)
    model.denoiser.requires_grad_(True)
    rollout = SelfForced(stream=stream, grids=TWO, exit="last", clips=3)
    whole = torch.cat(list(Session(model, PROMPTS).take(len(stream.lengths(12)))), 2)
    for stretch in range(9):
        heard, length = Heard(model.denoiser), stream.length(0)
        rolled = rolled_by(heard, model, rollout, Late((0, 1), stretch=stretch))
        first = min(stretch, 8 // length) * length
        assert torch.equal(rolled.x0.detach(), whole[:, :, first : first + 4])
        assert rolled.noise is not None and rolled.noise.shape[2] == 4
        assert sum(grad for grad, *_ in heard.calls) == len(stream.lengths(4))
    remember = stream.commit != "last"
    assert rollout.calls == 2 + remember + 1.0 * (
        2 + remember
    )  # half of the two clips that may come before, in all steps


def test_what_comes_before_the_stretch_takes_all_steps() -> None:
    """Whatever the exit: that is what the student will remember when it is sampled."""
    stream = Stream(chunks=(2,))
    model, heard = streaming_model(stream), Heard(streaming_model(stream).denoiser)
    rolled = rolled_by(heard, model, SelfForced(stream=stream, grids=TWO, clips=2), Late((0, 1), stretch=9), 2)
    assert rolled.exit == 0 and [round(t.max().item(), 2) for _, _, t, *_ in heard.calls] == [1.0, 0.5, 0.0, 1.0, 0.0]


def test_keys_and_values_of_steps_are_not_kept() -> None:
    """Only what is remembered of a chunk is: the others would fill a GPU."""
    stream, made = Stream(chunks=(2,)), list[weakref.ref[Tensor]]()
    model = streaming_model(stream)

    class Counted(Heard):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Any:
            assert sum(ref() is not None for ref in made) <= 2  # the last step's, and those of what is being remembered
            prediction = self.network(x_t, t, cond, call)
            made.append(weakref.ref(prediction.kv[0][0]))
            return prediction

    with torch.no_grad():
        rolled_by(Counted(model.denoiser), model, SelfForced(stream=stream, exit="last"), Numbers((0, 1)), 8)
    assert len(made) == 4 * (4 + 1)


DIAGONAL = ((1.0, 0.75, 0.5, 0.25), (1.0, 0.7, 0.25), (1.0, 0.25))
PLANS = {
    "diagonal": (Stream(steps=(4, 3, 2), commit="last", window=4, sink=1), DIAGONAL),
    "first frame": (Stream(chunks=(2,), steps=(4, 2)), DIAGONAL[::2]),
}


def stepped(stream: Stream, grids: Any) -> VideoModel:
    """The tiny model with the contract of a student that was trained with these steps."""
    model = streaming_model(Stream(chunks=stream.chunks, window=stream.window, sink=stream.sink))
    return model.with_part(
        "denoiser", model.denoiser, contract=SelfForced(stream=stream, grids=grids).contract(Contract())
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_chunks_with_steps_of_their_own_are_trained_as_they_are_served(plan: Any) -> None:
    """Bit for bit at the last exit; what is remembered of a chunk is what its last call left, and nothing else is called."""
    stream, grids = plan
    model = stepped(stream, grids)
    heard = Heard(model.denoiser.requires_grad_(True))
    rolled = rolled_by(heard, model, SelfForced(stream=stream, grids=grids, exit="last"), Numbers((0, 1)), 8)
    session = Session(model, PROMPTS)
    assert torch.equal(rolled.x0.detach(), torch.cat(list(session.take(len(stream.lengths(8)))), 2))
    counts = session.counts(len(stream.lengths(8)))
    once = [("." * (count - 1)) + "g" + "." * (stream.commit == "clean") for count in counts]
    assert "".join("g" if grad else "." for grad, *_ in heard.calls) == "".join(once)
    assert rolled.exit == 3 and rolled.grid == () and rolled.t.shape == (2, 8)
    assert rolled.t.tolist() == [[0.25] * 8] * 2


def test_every_step_of_a_chunk_is_as_likely() -> None:
    """One draw of all: 12 shares of 4, 3 and 2 steps. Chunks of one number of steps stop at the step that is drawn."""
    stream, grids = PLANS["diagonal"]
    model, found = stepped(stream, grids), list[tuple[int, ...]]()
    model.denoiser.requires_grad_(True)

    @dataclass(frozen=True)
    class Drawn(Numbers):
        share: int = 0

        def integer(self, name: str, high: int) -> int:
            assert (name, high) == ("exit", 12)
            return self.share

    for share in range(12):
        heard, rollout = Heard(model.denoiser), SelfForced(stream=stream, grids=grids)
        rolled = rolled_by(heard, model, rollout, Drawn((0, 1), share=share), 4)
        ends = [i for i, (grad, *_) in enumerate(heard.calls) if grad]
        lengths = [b - a for a, b in zip([-1, *ends], ends)]
        found.append(tuple(length - 1 for length in lengths))
        assert rolled.exit == max(found[-1]) == len(rolled.before)
        assert rolled.x0.requires_grad and not any(visit.x0.requires_grad for visit in rolled.before)
        for chunk, end in enumerate(ends):
            calls = heard.calls[end - found[-1][chunk] : end + 1]
            calls = [calls[0]] * (rolled.exit + 1 - len(calls)) + calls  # a chunk with fewer calls stays at its first
            for visit, (_, x_t, t, _, x0) in zip((*rolled.before, rolled), calls, strict=True):
                assert torch.equal(visit.x0[:, :, chunk : chunk + 1], x0) and torch.equal(visit.t[:, chunk], t)
                assert torch.equal(visit.x_t[:, :, chunk : chunk + 1], x_t)
    assert found[0] == (0, 0, 0, 0) and found[5] == (1, 1, 0, 0) and found[-1] == (3, 2, 1, 1)
    for chunk, count in enumerate((4, 3, 2, 2)):
        assert [[stops[chunk] for stops in found].count(step) for step in range(count)] == [12 // count] * count


def test_lists_of_times_are_those_of_the_chunks() -> None:
    stream, grids = PLANS["diagonal"]
    rollout = SelfForced(stream=stream, grids=grids)
    assert rollout.calls == 1.5 and SelfForced(stream=stream, grids=grids, exit="last").calls == 2
    assert SelfForced(stream=stream, grids=grids, clips=3).calls == 1.5 + 2 and rollout.fullest == {"exit": 11}
    for wrong in (grids[:2], (*grids, (1.0,))):
        with pytest.raises(ValueError, match="take 4, 3, 2 steps, and grids has lists of .*give one list for each"):
            SelfForced(stream=stream, grids=wrong)
    contract = rollout.contract(Contract())
    assert contract.stream == stream and contract.times(3) == (1.0, 0.7, 0.25, 0.0) and contract.calls() == 2


def test_its_student_streams() -> None:
    stream = Stream(chunks=(2,), window=4)
    teacher = Contract(grid=Shifted(shift=3.0), guidance=CFG(scale=4.0))
    contract = SelfForced(stream=stream, grids=TWO, shift=3.0).contract(teacher)
    assert contract.stream == stream and contract.times() == (1.0, 0.75, 0.0) and not contract.guidance.active


def test_a_run_trains_with_it_and_its_student_is_sampled_as_a_stream(tmp_path: Path) -> None:
    """Trained, probed and saved like any other; clips may be longer than those of the training."""
    method = DMD2(critic_updates=1, rollout=SelfForced(stream=Stream(chunks=(2,)), grids=TWO))
    model = tiny_model()
    student = train(model, method, WorldClips(num_frames=FRAMES), small(steps=2), tmp_path, quiet=True)
    assert student.card.contract.stream == Stream(chunks=(2,))
    again = VideoModel.from_pretrained(tmp_path / "student")
    assert torch.equal(again.latents(PROMPTS), student.latents(PROMPTS)) and student.latents(PROMPTS).shape[2] == FRAMES
    longer = again.latents(PROMPTS, num_frames=3 * FRAMES)
    assert longer.shape[2] == 3 * FRAMES and torch.equal(longer[:, :, :FRAMES], again.latents(PROMPTS))
    with pytest.raises(ValueError, match=r"7 frames are 7 latent frames, .*ask for 6 frames \(6 .*or 8 frames \(8"):
        again.sampling(PROMPTS, num_frames=7)  # at once
    for option in ({"shared": object()}, {"runner": lambda block, state, place: block(state)}):
        with pytest.raises(ValueError, match="leave"):
            again.sampling(PROMPTS, **option)
