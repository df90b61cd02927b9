"""Rollouts that begin with a clean image of the data, which stays in the sink: TalkingMachines' way on the beat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.compress import FrameInput
from fewstep.core import Batch, Rng
from fewstep.diffusion import Stream
from fewstep.methods import DMD2, SelfForced
from fewstep.methods.base import Nets
from fewstep.models import VideoModel
from fewstep.pipeline import Pipeline
from fewstep.streaming import Session
from support_engine import shaken, tiny_model
from test_self_forced import TWO, Numbers
from test_streaming import PROMPTS, streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
STREAM = Stream(chunks=(1, 2), window=5, sink=1)
ROLLOUT = SelfForced(stream=STREAM, given=1, grids=TWO, exit="last")


def listening(stream: Stream = STREAM) -> VideoModel:
    """Reads the beat of one frame before and two after."""
    model = tiny_model().with_card(contract=streaming_model(stream).card.contract)
    model = model.transformed(FrameInput(name="beat", back=1, ahead=2))
    shaken(model.denoiser.backbone.signals, 0.2)
    return model


def batch_of(model: VideoModel, frames: int = 5) -> Batch:
    cond = model.conditions(PROMPTS)[0].with_extra({"beat": Rng(0).rand((2, frames, 4), "beat")}, framewise=True)
    return Batch(cond, cond, (4, frames, 8, 8), x0=Rng(0).randn((2, 4, frames, 8, 8), "x0"))


@pytest.mark.parametrize(
    "stream", [STREAM, replace(STREAM, commit="last"), Stream(chunks=(1,), window=3, sink=1)], ids=str
)
def test_a_rollout_that_begins_with_data_is_a_session_that_begins_so(stream: Stream) -> None:
    """Bit for bit; teacher and critic see the given frame, and losses leave it out."""
    model = listening(stream)
    batch = batch_of(model)
    rolled = replace(ROLLOUT, stream=stream)(model.denoiser, batch, Numbers((0, 1)), grad=False)  # type: ignore[arg-type]
    session, made, first = Session(model, PROMPTS, seed=0), [], 0
    given = batch.require("x0")[:, :, :1]
    session.begin_with(given)
    for length in stream.lengths(5):
        *_, last = session.steps(extra={"beat": batch.cond.extra["beat"][:, first : first + length]})
        made.append(last.x)
        first += length
    assert torch.equal(rolled.clip, torch.cat(made, 2))
    assert rolled.past is not None and torch.equal(rolled.past, given)
    assert rolled.keep is not None and rolled.keep[0].tolist() == [0.0, 1.25, 1.25, 1.25, 1.25]


def test_the_image_of_the_data_reaches_every_chunk_and_the_beat_after_a_chunk_none() -> None:
    model = listening()
    batch = batch_of(model)
    clip = ROLLOUT(model.denoiser, batch, Numbers((0, 1)), grad=False).x0  # type: ignore[arg-type]
    x0 = batch.require("x0").clone()
    x0[:, :, 1:] += 1  # nothing else of the data is read
    assert torch.equal(ROLLOUT(model.denoiser, replace(batch, x0=x0), Numbers((0, 1)), grad=False).x0, clip)  # type: ignore[arg-type]
    x0[:, :, :1] += 1
    other = ROLLOUT(model.denoiser, replace(batch, x0=x0), Numbers((0, 1)), grad=False).x0  # type: ignore[arg-type]
    assert (other - clip).abs().amax((0, 1, 3, 4)).min() > 1e-6
    beat = batch.cond.extra["beat"].clone()
    beat[:, 3:] += 0.5
    later = replace(batch, cond=batch.cond.with_extra({"beat": beat}, framewise=True))
    heard = ROLLOUT(model.denoiser, later, Numbers((0, 1)), grad=False).x0  # type: ignore[arg-type]
    assert torch.equal(heard[:, :, :2], clip[:, :, :2]) and not torch.equal(heard[:, :, 2:], clip[:, :, 2:])


def test_scores_are_matched_on_what_the_student_made() -> None:
    """The gradient of DMD reaches the student, and a loss of the given frame alone would be none."""
    model = listening()
    nets = Nets(
        {role: listening().denoiser.requires_grad_(role == "student") for role in ("student", "teacher", "critic")}
    )
    method = DMD2(rollout=ROLLOUT)
    assert method.needs >= {"x0", "prompts"} and not ROLLOUT.whole
    shaken(nets.critic, 0.1)  # type: ignore[arg-type]
    losses: Any = {}
    for part in method.student_loss(nets, batch_of(model), Rng(0)):
        losses |= part
    sum(losses.values()).backward()
    assert sum(p.grad.abs().sum() for p in nets.student.parameters() if p.grad is not None) > 0  # type: ignore[union-attr, attr-defined]


def test_the_recipe_listens_as_its_stages_say() -> None:
    stages: Any = Pipeline.load("world/talking").stages
    teacher, causal, student = stages.values()
    assert causal.data == student.data and causal.method.history.stream == student.method.rollout.stream
    (signal,) = teacher.settings.transforms
    assert (
        (signal.back, signal.ahead)
        == (teacher.data.back, teacher.data.ahead)
        == (student.data.back, student.data.ahead)
    )
    rollout = student.method.rollout
    assert rollout.given == 1 and rollout.stream.sink == 1 == rollout.stream.length(0)
    assert rollout.stream.window == 1 + 2 * rollout.stream.length(1)
    assert rollout.stream.lengths(student.data.num_frames)[0] == 1


def test_what_cannot_begin_with_data_is_refused() -> None:
    model = listening()
    with pytest.raises(ValueError, match="several clips cannot begin with data"):
        SelfForced(stream=STREAM, given=1, clips=2)
    with pytest.raises(ValueError, match="a clip has 3 chunks, and given=3 leaves none"):
        replace(ROLLOUT, given=3)(model.denoiser, batch_of(model), Numbers((0, 1)), grad=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no x0"):
        ROLLOUT(model.denoiser, replace(batch_of(model), x0=None), Numbers((0, 1)), grad=False)  # type: ignore[arg-type]
