"""Memory by pose in the world with a camera: the same pose reads the same frames, in a stream and in a training rollout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.attention import Facing
from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import Stream
from fewstep.methods.rollouts import SelfForced
from fewstep.models import VideoModel
from fewstep.streaming import LiveSession, Session
from fewstep.world.actions import PACE, random_cameras, walked
from support_engine import shaken, tiny_model
from test_live import streaming_model

pytestmark = pytest.mark.usefixtures("single_thread")
MEMORY = Facing(frames=2, recent=2, sink=0, reach=PACE)
STREAM = Stream(chunks=(2,), memory=MEMORY)


def poses(*places: float) -> Tensor:
    """A camera that looks ahead, `[1, F, 6]`, at these places on a line, in units of its pace."""
    moves = torch.tensor([[[PACE * b - PACE * a, 0.0] for a, b in zip((places[0], *places), places)]])
    place = walked(torch.tensor([[PACE * places[0], 0.0]]), moves)
    return torch.cat([place, torch.tensor([0.0, 0, 0, 1]).expand(1, len(places), -1)], 2)


def there_and_back() -> Tensor:
    return poses(0, 0, 2, 4, 6, 6, 4, 2, 0, 0, 9, 9, 0, 0)


def model_of(stream: Stream) -> VideoModel:
    return tiny_model().with_card(contract=streaming_model(stream).card.contract)


def test_the_same_pose_reads_the_same_frames() -> None:
    """Out and back twice: at the first place chunk 0 is read again, whatever was seen meanwhile."""
    session, read = Session(model_of(STREAM), ["a red ball"]), []
    for part in there_and_back().split(2, 1):
        if session.snapshot.chunks:
            read.append(session.snapshot.memory.facing(part).read().positions.flatten().tolist())
        list(session.steps(extra={"pose": part}))
    assert read[3] == [0, 1, 6, 7]  # chunk 4 is back at 0: the first two frames, and the newest two
    assert read[4] == [4, 5, 8, 9]  # at 9: those that looked from 6
    assert read[5] == [0, 1, 10, 11]  # at 0 again: the same two as the first time


def test_a_live_stream_is_told_where_it_looks() -> None:
    track = there_and_back()
    with LiveSession(Session(model_of(STREAM), ["a red ball"]), beside=False) as live:
        assert live.control("pose", track) == 0
        shown = list(live.frames(7))
    assert torch.equal(torch.cat([chunk.told["pose"] for chunk in shown], 1), track)
    noted = live._session.snapshot.memory.notes[0]
    assert torch.equal(noted, track[:, :12])  # the last chunk is shown, and not remembered yet


def test_a_rollout_reads_by_pose_as_a_stream_does() -> None:
    """Poses are part of the condition of the clip, so teacher and critic are given the same; each chunk is told its own."""
    model, track = model_of(STREAM), torch.cat([there_and_back()[:, :8], random_cameras(1, 8, torch.Generator())])
    shaken(model.denoiser)
    rollout = SelfForced(stream=STREAM, exit="last", grids=((1.0, 0.5),))

    def rolled(poses: Tensor) -> Tensor:
        cond = model.conditions(["a red ball", "a blue star"])[0]
        cond = Cond(cond.text, cond.mask).with_extra({"pose": poses}, framewise=True)
        return rollout(model.denoiser, Batch(cond, cond, (4, 8, 8, 8)), Rng(2), grad=False).x0

    elsewhere = track.clone()
    elsewhere[0, 6:, 0] = 0  # the last chunk is back where the first one was, and not half-way
    a, b = rolled(track), rolled(elsewhere)
    assert torch.equal(a[:, :, :6], b[:, :, :6]) and not torch.equal(a[0, :, 6:], b[0, :, 6:])
    with pytest.raises(ValueError, match="tells 'pose' of 6 latent frames"):
        rolled(track[:, :6])
