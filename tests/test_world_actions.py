"""The steered world: keys, beat and camera move the object by known pixels, and the checker says whether a clip obeyed."""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi

import pytest
import torch

from fewstep.core import Rng
from fewstep.streaming.control import of_latents
from fewstep.world.action_clips import Told, WorldActions, sentence
from fewstep.world.actions import (
    KEYS,
    PACE,
    camera_moves,
    in_time,
    obeyed,
    paces,
    random_beat,
    random_cameras,
    random_keys,
    walked,
)
from fewstep.world.checker import Checker, wrap
from fewstep.world.grammar import describe, parse, sample_scenes
from fewstep.world.renderer import Variation, render, render_track
from support_engine import tiny_model

RING = parse("a small red ring moves slowly left over a navy background")


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pressed(*names: str) -> torch.Tensor:
    """Keys of one clip, one name per frame."""
    return torch.tensor([[[float(key == name) for key in KEYS] for name in names]])


def test_keys_move_the_object_by_their_pace() -> None:
    """Closed form: two to the right, one up, one of nothing; what is told of the first frame is not seen."""
    variation = Variation.sample(1, dice())
    moves = Told(keys=pressed("down", "right", "right", "up", "none")).moves([RING], variation, 5)
    track = walked(variation.position, moves)
    steps = torch.tensor([[0, 0], [PACE, 0], [2 * PACE, 0], [2 * PACE, -PACE], [2 * PACE, -PACE]])
    torch.testing.assert_close(track[0] - variation.position, steps, atol=1e-5, rtol=0)
    clip = render_track([RING], variation, track)
    for frame, step in enumerate(steps):
        there = replace(variation, position=variation.position + step)
        torch.testing.assert_close(clip[:, :, frame], render([RING], there, 1)[:, :, 0], atol=2e-5, rtol=0)


def test_a_track_of_constant_velocity_is_drawn_as_by_render_bit_for_bit() -> None:
    scenes, variation = sample_scenes(4, dice()), Variation.sample(4, dice(1))
    still = torch.zeros(4, 1, 1)
    assert torch.equal(
        render_track(scenes, variation, variation.position[:, None] + still), render(scenes, variation, 1)
    )
    with pytest.raises(ValueError, match="one of each per clip"):
        render_track(scenes, variation, torch.zeros(3, 2, 2))


def test_a_camera_moves_the_view_the_other_way() -> None:
    """And at the same pose the same is seen."""
    place = torch.tensor([[[0.0, 0], [2, 0], [2, 2], [2, 0], [0, 0]]])
    poses = torch.cat([place, torch.tensor([0.0, 0, 0, 1]).expand(1, 5, -1)], 2)
    still = replace(Variation.sample(1, dice()), speed_scale=torch.zeros(1))
    moves = Told(pose=poses).moves([RING], still, 5)
    assert torch.equal(moves[0], -torch.tensor([[0.0, 0], [2, 0], [0, 2], [0, -2], [-2, 0]]))
    clip = render_track([RING], still, walked(still.position, moves))
    torch.testing.assert_close(clip[:, :, 4], clip[:, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(clip[:, :, 3], clip[:, :, 1], atol=1e-5, rtol=0)
    assert torch.equal(clip[:, :, 1], clip[:, :, 0].roll(-2, -1)) or torch.allclose(
        clip[:, :, 1], clip[:, :, 0].roll(-2, -1), atol=1e-5
    )


def test_a_beat_sets_the_pace_in_the_direction_of_the_prompt() -> None:
    beat = torch.tensor([[[0.0], [0.0], [1.0], [0.5]]])
    scene = replace(RING, direction="down-left")
    moves = Told(beat=beat).moves([scene], Variation.sample(1, dice()), 4)
    torch.testing.assert_close(moves.norm(dim=2), torch.tensor([[0.5, 0.5, 2.5, 1.5]]))
    torch.testing.assert_close(moves[0, 2], 2.5 * cos(pi / 4) * torch.tensor([-1.0, 1.0]))
    both = Told(keys=pressed("up", "up", "up", "none"), beat=beat).moves([scene], Variation.sample(1, dice()), 4)
    torch.testing.assert_close(both[0], torch.tensor([[0, -0.5], [0, -0.5], [0, -2.5], [0, 0]]))


@pytest.mark.parametrize("signals", [("keys",), ("beat",), ("camera",), ("keys", "camera")], ids="-".join)
def test_the_checker_finds_that_rendered_clips_obey_and_others_do_not(signals) -> None:
    scenes, variation = sample_scenes(24, dice(3)), Variation.sample(24, dice(4))
    moves = Told.sample(signals, 24, 16, dice(5)).moves(scenes, variation, 16)
    track = Checker().read(render_track(scenes, variation, walked(variation.position, moves))).track
    right, others = obeyed(track, moves), obeyed(track, moves.roll(1, 0))
    assert right.shape == (24, 15) and right.double().mean() > 0.97
    assert others.double().mean() < 0.45, "clips that were told something else do not obey by accident"
    assert not obeyed(torch.full_like(track, torch.nan), moves).any()  # what cannot be seen does not obey


def test_an_object_in_time_with_a_beat_is_told_from_one_that_is_not() -> None:
    """Closed form; and on rendered clips, where the mean pace is within a pixel of most beats and in time with none."""
    moves = torch.tensor([[[9.0, 9.0], [0.5, 0], [2.5, 0], [1.5, 0]]])
    for moved, wanted in (((1, 5, 3), 1.0), ((5, 1, 3), -1.0), ((2, 2, 2), 0.0), ((1, 3, 5), 0.5)):
        track = torch.tensor([0.0, *moved]).cumsum(0)[None, :, None] * torch.tensor([0.6, 0.8])
        assert in_time(track, moves).tolist() == pytest.approx([wanted], abs=1e-6)
    unseen = torch.tensor([[[0.0, 0], [0, 1], [torch.nan, torch.nan], [0, 9], [0, 12]]])
    moves = torch.tensor([[[9.0, 9.0], [0.5, 0], [7.0, 0], [0, 0], [1.5, 0]]])
    assert in_time(unseen, moves).tolist() == pytest.approx([1.0])
    assert in_time(torch.full((1, 5, 2), torch.nan), moves).tolist() == [0.0]
    scenes, variation = sample_scenes(24, dice(3)), Variation.sample(24, dice(4))
    moves = Told.sample(("beat",), 24, 16, dice(5)).moves(scenes, variation, 16)
    track = Checker().read(render_track(scenes, variation, walked(variation.position, moves))).track
    assert in_time(track, moves).mean() > 0.95 and in_time(track, moves.roll(1, 0)).mean() < 0.3
    mean = walked(variation.position, moves.mean(1, keepdim=True).expand_as(moves))
    assert obeyed(mean, moves).double().mean() > 0.6 and in_time(mean, moves).abs().max() < 1e-6


def test_half_a_step_is_the_border() -> None:
    moves = torch.tensor([[[0.0, 0.0], [PACE, 0.0]]])
    for moved, right in ((0.51 * PACE, True), (1.49 * PACE, True), (0.49 * PACE, False), (-PACE, False)):
        assert obeyed(torch.tensor([[[31.0, 5.0], [31.0 + moved, 5.0]]]), moves).tolist() == [[right]]
    over_the_edge = torch.tensor([[[31.5, 5.0], [1.5, 5.0]]])
    assert obeyed(over_the_edge, moves).all()


def test_keys_are_held_and_none_of_them_is_preferred() -> None:
    keys = random_keys(400, 64, dice(), held=(2, 8))
    assert set(keys.sum(2).unique().tolist()) == {0.0, 1.0}
    share = torch.cat([keys.mean((0, 1)), 1 - keys.sum(2).mean()[None]])
    assert ((share - 0.2).abs() < 0.02).all(), share
    changes = (keys.diff(dim=1) != 0).any(2).double().mean()
    assert abs(float(changes) - 1 / 5) < 0.02  # they are held for five frames in the mean
    beat = random_beat(200, 64, dice())
    assert beat.min() >= 0 and beat.max() == 1 and (beat.diff(dim=1) > 0).double().mean() < 0.3
    assert paces(beat).max() == 2.5
    poses = random_cameras(50, 32, dice())
    assert poses.shape == (50, 32, 6) and (poses[:, 0] == torch.tensor([0.0, 0, 0, 0, 0, 1])).all()
    assert set(camera_moves(poses).norm(dim=2).unique().tolist()) == {0.0, 1.0}


def test_a_latent_frame_is_told_the_mean_of_its_frames() -> None:
    """Wan's first latent frame is one frame, the others are four each."""
    numbers = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0, 0]])[..., None]
    assert of_latents(numbers, (0, 1, 5, 9))[0, :, 0].tolist() == [1.0, 0.5, 0.0]
    assert torch.equal(of_latents(numbers, range(10)), numbers)
    assert of_latents(numbers[:, 5:], (5, 9)).tolist() == [[[0.0]]]
    with pytest.raises(ValueError, match="9 frames need as many numbers"):
        of_latents(numbers[:, :8], (0, 1, 5, 9))


def test_a_batch_tells_both_conditions_and_not_the_prompt() -> None:
    model = tiny_model()
    data = WorldActions(num_frames=16, signals=("keys", "camera"))
    batch = data.open(model, WorldActions.provides).batch(6, Rng(0))
    keys, frames = batch.cond.extra["keys"], batch.require("frames")
    assert batch.cond.framewise == batch.uncond.framewise == {"keys", "camera", "pose"}
    assert keys.shape == (6, 16, 4) and batch.cond.extra["pose"].shape == (6, 16, 6)
    assert torch.equal(keys, batch.uncond.extra["keys"])  # guidance is by the text alone
    assert frames.shape == (6, 3, 16, 32, 32) and batch.require("x0").shape == (6, 4, 16, 8, 8)
    assert not any(word in prompt for prompt in batch.prompts for word in ("moves", "quickly", "slowly", "left"))
    moves = Told(keys, None, batch.cond.extra["pose"]).moves((), Variation.sample(6, dice()), 16)
    assert obeyed(Checker().read(frames).track, moves).double().mean() > 0.95
    again = data.open(model, WorldActions.provides).batch(6, Rng(0))
    assert torch.equal(again.require("x0"), batch.require("x0"))
    assert wrap(torch.tensor(17.0)) == -15


def test_a_prompt_says_what_no_signal_says() -> None:
    assert sentence(RING, ["camera"]) == describe(RING)
    assert sentence(RING, ["beat"]) == "a small red ring moves left over a navy background"
    for wrong in ((), ("keys", "keys")):
        with pytest.raises(ValueError, match="at least one of keys, beat and camera"):
            WorldActions(signals=wrong)
