"""Adversarial self-distillation: a student in n steps is compared with itself in more steps, from the same noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import Batch, Call, Cond, Rng
from fewstep.diffusion import CFG, Prediction, Stream
from fewstep.engine import train
from fewstep.methods import DMD2, BackwardSimulation, FromData, Heads, Nets, SelfAdversarial, SelfForced, Update, Work
from fewstep.methods.gan import paired_discriminator, paired_generator
from fewstep.streaming import Session
from fewstep.world.data import WorldClips
from support_engine import FRAMES, small, tiny_model
from support_gaussian import RF, Asked, FreeClips, GaussianTeacher, cond_of, f64, terms

pytestmark = pytest.mark.usefixtures("single_thread")
GRIDS = ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25))
SHAPE, B = (2, 3, 2, 2), 3
WHOLE = SelfAdversarial(
    rollout=BackwardSimulation(grids=GRIDS), critic_updates=1, guidance=CFG(scale=2.0), adversarial=0.5
)
MEANS = f64(-1.0, 0.7)


class Curved(nn.Module):
    """Heads whose logits are far from flat everywhere: one for each layer that it is given, all different."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(1.0, 2.0, heads).double())

    def forward(self, features: list[Tensor]) -> Tensor:
        each = [(gain * x).sin().flatten(1).mean(1) for gain, x in zip(self.gain, features, strict=True)]
        return torch.stack(each, 1)


class ByTime(nn.Module):
    """A student whose prediction is its own number for each time: a rollout ends with that of its last time."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.levels = RF, nn.Parameter(f64(0.1, 0.4, -0.3, 0.9))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        level = self.levels[((1 - t.double()) * 4).round().long()]
        return Prediction(x_t.double() * 0.2 + level.reshape(-1, 1, 1, 1, 1), "x0", x_t, t, RF)


def nets_with(student: nn.Module, discriminator: nn.Module | None = None) -> Nets:
    networks = {"student": student, "teacher": GaussianTeacher(MEANS, 0.4), "critic": GaussianTeacher(MEANS + 0.3, 0.5)}
    for network in (networks["teacher"], networks["critic"]):
        network.requires_grad_(False)
    return Nets({name: Asked(net) for name, net in networks.items()} | {"discriminator": discriminator or Curved()})


def batch() -> Batch:
    return Batch(cond_of(1, B), cond_of(0, B), SHAPE)


def student_terms(nets: Nets, n: int, method: SelfAdversarial = WHOLE, step: int = 0) -> dict[str, Tensor]:
    return terms(method.student_loss(n, nets, batch(), Rng(0, step)))


def test_where_both_clips_are_equal_the_student_is_not_moved() -> None:
    """Whatever the discriminator is. A relativistic softplus has slope 1/2 at a difference of 0, and would move it."""
    nets = nets_with(FreeClips((B, *SHAPE)))
    for n in (0, 1):
        (grad,) = torch.autograd.grad(student_terms(nets, n)["adversarial"], nets.student.net.clips)
        assert not grad.any()
    fake = torch.zeros(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(nn.functional.softplus(torch.zeros(3, 2) - fake).mean(), fake)
    assert torch.equal(grad, torch.full((3, 2), -0.5 / 6))


def test_the_student_moves_towards_what_more_steps_make() -> None:
    """From both sides: the loss is the square of the difference of two logits, of one head, at one time and one noise."""
    nets = nets_with(ByTime())
    for n in (0, 1):
        found = student_terms(nets, n)["adversarial"]
        rng, x = (
            Rng(0).fold("student"),
            [g(nets.student, batch(), Rng(0).fold("student"), grad=False).x0 for g in WHOLE.grids],
        )
        eps, t = rng.randn((B, *SHAPE), "eps"), WHOLE.score_density.sample(B, rng)
        a, s = 1 - t[:, None, None, None, None], t[:, None, None, None, None]
        logit = [((1.0 + n) * (a * clip + s * eps)).sin().flatten(1).mean(1) for clip in x[n : n + 2]]
        torch.testing.assert_close(found, 0.5 * (logit[0] - logit[1]).square().mean().to(found))


def test_gradient_flows_through_the_branch_of_fewer_steps_alone() -> None:
    """Of 1 and 2 steps only the one call of the first has it; no weight of teacher, critic or discriminator gets any."""
    nets = nets_with(ByTime())
    losses = student_terms(nets, 0)
    assert [(q.grad, float(q.t[0])) for q in nets.student.questions] == [(True, 1.0), (False, 1.0), (False, 0.5)]
    nets.discriminator.requires_grad_(False)
    losses["adversarial"].backward()
    grad = nets.student.net.levels.grad
    assert grad is not None and grad[0] != 0 and not grad[1:].any()
    assert nets.discriminator.gain.grad is None and nets.teacher.net.means.grad is None


def test_both_branches_start_from_one_noise_and_the_critic_learns_fewer_steps() -> None:
    nets = nets_with(ByTime())
    losses = terms(WHOLE.critic_loss(0, 0, nets, batch(), Rng(0)))
    first, second, _ = nets.student.questions
    assert torch.equal(first.x_t, second.x_t) and first.t.unique().tolist() == second.t.unique().tolist() == [1.0]
    assert not any(q.grad for q in nets.student.questions)
    (asked,) = nets.critic.questions
    y = nets.student.net(first.x_t, first.t, cond_of(1, B)).x0
    eps = (asked.x_t - (1 - asked.t)[:, None, None, None, None] * y) / asked.t[:, None, None, None, None]
    expected = (nets.critic.net(asked.x_t, asked.t, cond_of(1, B)).flow - (eps - y)).square().mean()
    torch.testing.assert_close(losses["denoising"], expected.to(losses["denoising"]))
    again = terms(WHOLE.critic_loss(0, 1, nets, batch(), Rng(0)))
    assert not torch.equal(nets.student.questions[3].x_t, first.x_t), "every turn has noise of its own"
    assert again["denoising"] != losses["denoising"]


def test_the_discriminator_sees_both_clips_at_one_time_and_noise() -> None:
    nets, method = nets_with(FreeClips((B, *SHAPE))), SelfAdversarial(rollout=WHOLE.rollout, r1=2.0, rho=0.25)
    losses = terms(method.critic_loss(0, 0, nets, batch(), Rng(0)))
    more, fewer, near_more, near_fewer = nets.teacher.questions
    assert torch.equal(more.x_t, fewer.x_t) and torch.equal(more.t, fewer.t), "equal clips look equal"
    assert torch.equal(near_more.x_t, near_fewer.x_t)
    assert float((near_more.x_t - more.x_t).std()) == pytest.approx(0.25, rel=0.3)
    assert float(losses["discriminator"].detach()) == pytest.approx(1.0), "nothing to tell: (0 - 1)^2"
    at, by = (nets.discriminator([x.x_t] * 2)[:, 0] for x in (more, near_more))
    torch.testing.assert_close(losses["r1"], 2.0 * (at - by).square().mean())


def test_real_is_what_more_steps_make() -> None:
    """The discriminator's optimum gives it a logit that is larger by 1."""
    real, fake = f64(0.7, -0.2), f64(0.1, 0.3)
    torch.testing.assert_close(paired_discriminator(real, fake), f64((0.6 - 1) ** 2, (-0.5 - 1) ** 2).mean())
    assert paired_discriminator(fake + 1, fake) == 0 and paired_generator(fake, fake) == 0
    torch.testing.assert_close(paired_generator(fake, real), f64(0.36, 0.25).mean())
    nets = nets_with(ByTime())
    found = terms(WHOLE.critic_loss(1, 0, nets, batch(), Rng(0)))["discriminator"]
    calls = [float(q.t[0]) for q in nets.student.questions]
    assert calls == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    rng, t = Rng(0).fold("critic/0"), nets.teacher.questions[0].t[:, None, None, None, None]
    clips = [WHOLE.grids[n](nets.student, batch(), rng, grad=False).x0 for n in (2, 1)]
    noised = [(1 - t) * clip + t * rng.randn((B, *SHAPE), "eps") for clip in clips]
    more, fewer = (nets.discriminator([x_t] * 2)[:, 1] for x_t in noised)
    torch.testing.assert_close(found, (more - fewer - 1).square().mean().to(found))


@pytest.mark.parametrize("n", [0, 1])
def test_each_step_count_has_heads_of_its_own(n: int) -> None:
    nets = nets_with(ByTime())
    terms(WHOLE.critic_loss(n, 0, nets, batch(), Rng(0)))["discriminator"].backward()
    assert [bool(g) for g in nets.discriminator.gain.grad] == [n == 0, n == 1]
    assert SelfAdversarial(layers=(0, -1)).aux()["discriminator"] == Heads("teacher", (0, -1, 0, -1))


def test_step_counts_take_turns_and_the_largest_is_matched_to_the_teacher_alone() -> None:
    def trained(step: int) -> list[tuple[str, ...]]:
        return [update.roles for update in WHOLE.updates(step) if isinstance(update, Update)]

    both, critic = [("critic", "discriminator"), ("student",)], [("critic",), ("student",)]
    assert [trained(step) for step in range(4)] == [both, both, critic, both]
    nets = nets_with(ByTime())
    assert student_terms(nets, 2).keys() == {"matching"} and len(nets.student.questions) == 4
    assert terms(WHOLE.critic_loss(2, 0, nets, batch(), Rng(0))).keys() == {"denoising"}
    assert [q.grad for q in nets.student.questions] == [False] * 3 + [True] + [False] * 4


def test_the_scores_are_those_of_dmd2() -> None:
    """The same loss as DMD2 with the last exit on one grid."""
    for n, grid in enumerate(GRIDS):
        rollout = BackwardSimulation(grids=(grid,), exit="last")
        dmd2 = DMD2(rollout=rollout, guidance=WHOLE.guidance)
        nets = nets_with(ByTime())
        mine, theirs = student_terms(nets, n)["matching"], terms(dmd2.student_loss(nets, batch(), Rng(0)))["matching"]
        torch.testing.assert_close(mine, theirs)


def test_its_cost_counts_both_branches() -> None:
    """One critic turn, counts 1, 2 and 4; the last one has no second branch."""
    nets, method = nets_with(ByTime()), SelfAdversarial(rollout=WHOLE.rollout, critic_updates=1)
    for step in range(3):
        for update in method.updates(step):
            terms(update.losses(nets, batch(), Rng(0, step)))
    student, teacher, critic, eyes = method.cost()
    calls = len(nets.student.questions)
    assert student == Work("student", pytest.approx((calls + 3 * 2) / 3)), "2 more for each backward pass"
    assert len(nets.critic.questions) == 3 * 2 and critic == Work("critic", 4)
    assert eyes.layers == (-1,) and eyes.forwards == pytest.approx(2 / 3 * (2 + 3))
    assert teacher == Work("teacher", 2)


@pytest.mark.parametrize(
    "rollout",
    [
        FromData(),
        SelfForced(),
        SelfForced(grids=2 * GRIDS[:1]),
        SelfForced(grids=GRIDS[1:], stream=Stream(steps=(4, 2))),
    ],
)
def test_what_has_no_two_step_counts_is_refused(rollout: Any) -> None:
    with pytest.raises(ValueError, match="clips of two step counts are compared"):
        SelfAdversarial(rollout=rollout)


def test_one_student_streams_in_every_step_count(tmp_path: Path) -> None:
    rollout = SelfForced(grids=GRIDS, stream=Stream(chunks=(2,)))
    method = SelfAdversarial(rollout=rollout, critic_updates=1)
    student = train(tiny_model(), method, WorldClips(num_frames=FRAMES), small(steps=3), tmp_path, quiet=True)
    assert student.card.contract.counts == (1, 2, 4) and student.card.contract.stream == rollout.stream
    clips = [student.latents(["a red ball"], num_inference_steps=steps, num_frames=4) for steps in (1, 2, 4)]
    assert all(not torch.equal(a, b) for a, b in pairwise(clips)) and all(clip.isfinite().all() for clip in clips)
    first = replace(student.card.contract, stream=Stream(chunks=(2,), steps=(4, 1)))
    enhanced = student.with_card(contract=first)
    assert Session(enhanced, ["a red ball"]).counts(3) == (4, 1, 1)


def test_each_step_count_has_a_head_on_every_layer() -> None:
    method = replace(WHOLE, layers=(0, -1))
    for n, own in ((0, [True, True, False, False]), (1, [False, False, True, True])):
        nets = nets_with(ByTime(), Curved(4))
        nets.teacher.features = lambda x, t, cond, layers: [x] * len(layers)
        terms(method.critic_loss(n, 0, nets, batch(), Rng(0)))["discriminator"].backward()
        assert [bool(g) for g in nets.discriminator.gain.grad] == own


def test_its_penalty_looks_at_both_clips_again() -> None:
    plain, penalised = (replace(WHOLE, critic_updates=2, r1=r1).cost()[-1].forwards for r1 in (0.0, 1.0))
    assert (plain, penalised) == (pytest.approx(2 / 3 * (2 * 2 + 3)), pytest.approx(2 / 3 * (2 * 4 + 3)))


def test_a_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="no rollout.phase"):
        SelfAdversarial(rollout=BackwardSimulation(grids=GRIDS[1:], phase=(0, 1)))
