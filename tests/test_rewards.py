"""Rewards: weights of mean 1 on the gradient of each clip, and none of their own gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import Batch, Rng
from fewstep.diffusion import CFG
from fewstep.engine.nets import build_nets
from fewstep.engine.prepare import prepare
from fewstep.methods import DMD2, MotionReward, Nets, Reward, Rolled
from fewstep.metrics import motion
from fewstep.models import VideoModel
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import ONE_STEP, FreeClips, GaussianTeacher, cond_of, conds_of, f64, terms

pytestmark = pytest.mark.usefixtures("single_thread")
B, SHAPE = 3, (3, 4, 4, 4)
METHOD = DMD2(rollout=ONE_STEP, guidance=CFG())


class Plain(nn.Module):
    """A codec whose latents are frames."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True, kw_only=True)
class Fixed(Reward):
    """A reward by the number of the clip."""

    values: tuple[float, ...] = (0.0, 0.0, 0.0)

    def score(self, frames: Tensor) -> Tensor:
        return f64(*self.values) + 0 * frames.flatten(1).sum(1)


def gradient(reward: Reward | None) -> Tensor:
    student = FreeClips((B, *SHAPE))
    teacher, critic = GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4), GaussianTeacher(f64(0.3, -0.6, 0.1), 0.5)
    nets = Nets({"student": student, "teacher": teacher, "critic": critic, "codec": Plain()})
    batch = Batch(conds_of([1, 2, 1]), cond_of(0, B), SHAPE)
    terms(replace(METHOD, reward=reward).student_loss(nets, batch, Rng(0)))["matching"].backward()
    assert student.clips.grad is not None
    return student.clips.grad


def test_each_clips_gradient_is_weighted_by_exp_r_over_beta_and_nothing_else() -> None:
    """Also where r depends on the clip and autograd could follow it."""
    values = (0.3, -0.1, 0.2)
    weight = (f64(*values) / 0.5).exp()
    weight = weight / weight.mean()
    expected = gradient(None) * weight.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(gradient(Fixed(values=values, beta=0.5)), expected)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_where_all_clips_are_as_good_it_is_dmd_bit_for_bit(value: float) -> None:
    assert torch.equal(gradient(Fixed(values=(value,) * 3, beta=0.01)), gradient(None))


def test_weights_have_mean_one_before_they_are_limited_and_never_overflow() -> None:
    score = torch.linspace(0, 1, 5).double()
    weights = Fixed(beta=1.0, limit=10.0).weights(score)
    assert float(weights.mean()) == pytest.approx(1) and float(weights[4] / weights[0]) == pytest.approx(2.718281828)
    hard = Fixed(beta=1e-4, limit=4.0).weights(score)
    assert hard.tolist() == [0.25, 0.25, 0.25, 0.25, 4.0]
    assert torch.allclose(Fixed().weights(score + 1e6), Fixed().weights(score), atol=1e-9)


def test_motion_is_measured_on_the_decoded_clip_with_its_past() -> None:
    seen = list[Tensor]()

    class Double(Plain):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(latents)
            return 2 * latents

    x0 = (0.1 * Rng(0).randn((2, *SHAPE), "x")).requires_grad_(True)
    past = 0.1 * Rng(0).randn((2, 3, 1, 4, 4), "past")
    rolled = Rolled(x0, x0, torch.ones(2), past=past)
    reward = MotionReward(beta=0.05)
    found = reward.keep(Double(), rolled)
    assert torch.equal(seen[0], rolled.clip) and not found.requires_grad
    weights = reward.weights(motion((2 * rolled.clip.detach()).clamp(-1, 1))).float()
    torch.testing.assert_close(found, weights[:, None] * torch.tensor([0.0, 1.25, 1.25, 1.25, 1.25]))
    alone = reward.keep(Double(), Rolled(x0, x0, torch.ones(2)))
    assert alone.shape == (2, 1)


def test_what_cannot_count_is_refused() -> None:
    with pytest.raises(ValueError, match="raise settings.batch"):
        MotionReward().weights(torch.zeros(1))
    with pytest.raises(ValueError, match="limit must be more than 1"):
        MotionReward(limit=1.0)
    with pytest.raises(ValueError, match="beta must be more than 0"):
        MotionReward(beta=0.0)


def test_a_run_decodes_with_a_copy_that_is_neither_trained_nor_kept(tmp_path: Path) -> None:
    model = tiny_model()
    run = prepare(
        model,
        DMD2(critic_updates=1, reward=MotionReward()),
        WorldClips(num_frames=FRAMES),
        small(1, health=None),
        tmp_path,
    )
    before = [p.clone() for p in run.nets["codec"].parameters()]
    run.iterate()
    assert all(torch.equal(a, b) for a, b in zip(run.nets["codec"].parameters(), before, strict=True))
    assert run.nets["codec"] is not model.codec and "codec" not in run.changing
    bare = VideoModel(model.card, {name: part for name, part in model.parts.items() if name != "codec"})
    with pytest.raises(ValueError, match="no autoencoder"):
        build_nets(bare, DMD2(reward=MotionReward()), 0)
