"""What every network of a method is asked (clip, time, condition), and what is made of its answers, by formula.

Clips of a batch have different conditions, so that those of another clip are noticed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core import Batch, Pairs, Rng
from fewstep.diffusion import CFG, DDIM, Contract, Heun, NoisePath, Renoise, Shifted, Trig, Uniform, uniform_grid
from fewstep.diffusion import Grid as TimeGrid
from fewstep.methods import (
    DMD2,
    Adversary,
    BackwardSimulation,
    Consistency,
    FlowMatching,
    FromPairs,
    KnowledgeDistillation,
    Nets,
    Progressive,
    ReadAttributes,
    Reconstruction,
    ReverseKL,
    Scorers,
    Sync,
    Update,
)
from fewstep.methods.motion import motion_matching
from support_gaussian import (
    ONE_STEP,
    RF,
    AffineTableStudent,
    Asked,
    FreeClips,
    GaussianTeacher,
    MeanHead,
    Question,
    cond_of,
    conds_of,
    f64,
    terms,
)

LABELS, B, SHAPE = [1, 2, 1, 1], 4, (1, 4, 8, 8)
MEANS, OTHER = f64(-0.2, 0.7, 1.5), f64(0.3, -0.6, 0.1)
TEACHER = Contract(sampler=Heun(), steps=40, grid=Shifted(shift=7.0), guidance=CFG(scale=5.0))


def clips(name: str, size: int = B) -> Tensor:
    return Rng(3).randn((size, *SHAPE), name).double()


def make_batch(**others: object) -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=3 + clips("real"), **others)  # type: ignore[arg-type]


def asked(**networks: nn.Module) -> Nets:
    return Nets({role: Asked(net) for role, net in networks.items()})


def noise_of(question: Question, clean: Tensor) -> Tensor:
    """The noise in what was asked, if it was `clean` on rectified flow; checked to be standard normal."""
    t = question.t.double().reshape(-1, 1, 1, 1, 1)
    eps = (question.x_t - (1 - t) * clean) / t
    assert abs(float(eps.mean())) < 0.15 and abs(float(eps.std()) - 1) < 0.15, "these clips were not noised"
    return eps


def within(times: Tensor, low: float, high: float) -> bool:
    return bool(((times >= low) & (times <= high)).all()) and len(times.unique()) == len(times)


# --- distribution matching --------------------------------------------------------------------------------------------

METHOD = DMD2(
    rollout=ONE_STEP,
    guidance=CFG(scale=2.5),
    critic_updates=2,
    score_density=Uniform(low=0.3, high=0.4),
    critic_density=Uniform(low=0.8, high=0.9),
)
ADVERSARIAL = replace(METHOD, adversary=Adversary(weight=0.03, r1=2.0, rho=0.1))


def dmd2_nets() -> Nets:
    nets = asked(
        student=FreeClips((B, *SHAPE)), teacher=GaussianTeacher(MEANS, 0.4), critic=GaussianTeacher(OTHER, 0.5)
    )
    return Nets({**nets, "discriminator": MeanHead()})


def test_dmd2_moves_the_student_by_the_difference_of_guided_teacher_and_plain_critic() -> None:
    nets, batch = dmd2_nets(), make_batch()
    terms(METHOD.student_loss(nets, batch, Rng(0)))["matching"].backward()
    (seen,), made = nets.critic.questions, nets.student.net.clips
    assert within(seen.t, 0.3, 0.4) and seen.labels == LABELS
    noise_of(seen, made.detach())
    teacher, cond, null = nets.teacher.net, conds_of(LABELS), cond_of(0, B)
    plain, free = (teacher(seen.x_t, seen.t, c).x0.detach() for c in (cond, null))
    real, fake = free + 2.5 * (plain - free), nets.critic.net(seen.x_t, seen.t, cond).x0.detach()
    weight = 1 / ((made.detach() - real).abs().flatten(1).mean(1) + 1e-5)
    torch.testing.assert_close(made.grad, weight.reshape(-1, 1, 1, 1, 1) * (fake - real) / made.numel())
    assert not any(question.grad for role in ("teacher", "critic") for question in nets[role].questions)


def test_dmd2_trains_its_critic_on_the_students_clips_with_their_conditions() -> None:
    nets, batch = dmd2_nets(), make_batch()
    loss = terms(METHOD.critic_loss(0, nets, batch, Rng(0)))["denoising"]
    (drawn,), (seen,), made = nets.student.questions, nets.critic.questions, nets.student.net.clips.detach()
    assert not drawn.grad and drawn.labels == seen.labels == LABELS and not nets.teacher.questions
    assert within(seen.t, 0.8, 0.9)
    answer = nets.critic.net(seen.x_t, seen.t, conds_of(LABELS)).raw
    torch.testing.assert_close(loss, (answer - (noise_of(seen, made) - made)).square().mean())


def test_dmd2_shows_its_discriminator_real_made_and_nearly_real_clips() -> None:
    nets, batch = dmd2_nets(), make_batch()
    losses = terms(ADVERSARIAL.critic_loss(0, nets, batch, Rng(0)))
    real, fake, near = nets.teacher.questions
    eps = noise_of(fake, nets.student.net.clips.detach())
    torch.testing.assert_close(noise_of(real, batch.require("x0")), eps)
    assert torch.equal(fake.x_t, nets.critic.questions[0].x_t), "the critic's own noise"
    step = (near.x_t - real.x_t) / 0.1
    assert abs(float(step.std()) - 1) < 0.1 and abs(float((step * eps).mean())) < 0.1, "a perturbation of its own"
    assert real.labels == fake.labels == near.labels == LABELS and torch.equal(real.t, fake.t)
    assert torch.equal(real.t, near.t) and torch.equal(fake.t, nets.critic.questions[0].t)
    d_real, d_fake, d_near = (question.x_t.flatten(1).mean(1) for question in (real, fake, near))
    torch.testing.assert_close(losses["discriminator"], F.softplus(-d_real).mean() + F.softplus(d_fake).mean())
    torch.testing.assert_close(losses["r1"], 2.0 * (d_real - d_near).square().mean())
    assert not any(question.grad for question in nets.teacher.questions)


def test_dmd2_puts_the_weighted_adversarial_gradient_on_the_student() -> None:
    nets, batch = dmd2_nets(), make_batch()
    loss = terms(ADVERSARIAL.student_loss(nets, batch, Rng(0)))["adversarial"]
    loss.backward()
    (scored,), seen = nets.critic.questions, nets.teacher.questions[-1]
    assert torch.equal(seen.x_t, scored.x_t) and torch.equal(seen.t, scored.t) and seen.labels == LABELS
    logits, made = seen.x_t.flatten(1).mean(1), nets.student.net.clips
    torch.testing.assert_close(loss.detach(), 0.03 * F.softplus(-logits).mean())
    slope = -0.03 * torch.sigmoid(-logits) / B * (1 - seen.t.double()) / made[0].numel()
    torch.testing.assert_close(made.grad, slope.reshape(-1, 1, 1, 1, 1).expand_as(made))


def test_dmd2_weighs_its_regression_on_stored_endpoints() -> None:
    states = torch.stack([clips("start"), clips("end")], 1)
    nets, batch = dmd2_nets(), make_batch(pairs=Pairs(states, (1.0, 0.0)))
    method = replace(METHOD, anchor=0.25, anchor_rollout=FromPairs(grids=((1.0,),)))
    loss = terms(method.student_loss(nets, batch, Rng(0)))["anchor"]
    error = nets.student.net.clips.detach() - states[:, 1]
    torch.testing.assert_close(loss.detach(), 0.25 * ((error.square() + 1e-6).sqrt() - 1e-3).mean())
    assert torch.equal(nets.student.questions[-1].x_t, states[:, 0])


def test_dmd2_weighs_the_motion_of_the_same_scores() -> None:
    nets, batch = dmd2_nets(), make_batch()
    without = terms(METHOD.student_loss(dmd2_nets(), batch, Rng(0)))["matching"]
    both = terms(replace(METHOD, matching=ReverseKL(motion=0.2)).student_loss(nets, batch, Rng(0)))["matching"]
    (seen,), made = nets.critic.questions, nets.student.net.clips.detach()
    teacher, cond, null = nets.teacher.net, conds_of(LABELS), cond_of(0, B)
    plain, free = (teacher(seen.x_t, seen.t, c).x0.detach() for c in (cond, null))
    fake = nets.critic.net(seen.x_t, seen.t, cond).x0.detach()
    moved = 0.2 * motion_matching(made, free + 2.5 * (plain - free), fake)
    torch.testing.assert_close((both - without).detach(), moved)


@pytest.mark.parametrize("weak", [0.0, 0.25])
def test_dmd2_takes_its_real_score_from_the_weak_role_where_there_is_one(weak: float) -> None:
    nets = Nets({**dmd2_nets(), **asked(real=GaussianTeacher(OTHER, 0.4))})
    terms(replace(METHOD, scorers=Scorers(weak=weak)).student_loss(nets, make_batch(), Rng(0)))
    assert bool(nets["real"].questions) == (weak > 0) == (not nets.teacher.questions)
    assert ("real" in replace(METHOD, scorers=Scorers(weak=weak)).aux()) == (weak > 0)


def test_dmd2_guides_its_critic_in_both_turns_if_told_so() -> None:
    """SiD-LSG; scale 0 is a critic that reads the null prompt alone."""
    method, batch = replace(METHOD, critic_guidance=CFG(scale=0.0)), make_batch()
    nets = dmd2_nets()
    learnt = terms(method.critic_loss(0, nets, batch, Rng(0)))["denoising"]
    (seen,), made = nets.critic.questions, nets.student.net.clips.detach()
    x_t, t = seen.x_t[:B], seen.t[:B]
    answer = nets.critic.net(x_t, t, cond_of(0, B)).raw
    target = (x_t - (1 - t.double().reshape(-1, 1, 1, 1, 1)) * made) / t.double().reshape(-1, 1, 1, 1, 1) - made
    torch.testing.assert_close(learnt, (answer - target).square().mean())
    terms(method.student_loss(nets, batch, Rng(0)))
    assert nets.critic.questions[-1].labels == [*LABELS, *[0] * B]
    assert sum(work.forwards for work in method.cost()) == sum(work.forwards for work in METHOD.cost()) + 7


def test_dmd2_mixes_a_share_of_the_student_into_its_critic() -> None:
    *_, student, sync = replace(METHOD, align=0.03).updates(0)
    assert student.roles == ("student",)
    assert sync == Sync("critic", "student", 0.97)
    assert not [event for event in METHOD.updates(0) if isinstance(event, Sync)]


def test_dmd2_draws_new_clips_for_every_turn() -> None:
    nets = dmd2_nets()
    for update in METHOD.updates(0):
        terms(update.losses(nets, make_batch(), Rng(0)))
    inputs = [question.x_t for question in nets.student.questions]
    assert len(inputs) == 3 and not any(torch.equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_every_call_of_a_simulation_has_the_clips_own_conditions_and_the_grids_next_time() -> None:
    table = AffineTableStudent(uniform_grid(4, 5.0)[:-1]).fill([(0.1, 0.2), (0.3, 0.1), (0.5, 0.0), (0.9, 0.1)])
    nets = asked(student=table)
    rollout = BackwardSimulation(grids=((1.0, 0.75, 0.5, 0.25),), shift=5.0, exit="last")
    rolled = rollout(nets.student, make_batch(), Rng(0), grad=True)
    assert [question.labels for question in nets.student.questions] == [LABELS] * 4
    times = [question.t.unique().tolist() for question in nets.student.questions]
    assert [t for (t,) in times] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])
    assert torch.equal(rolled.t, nets.student.questions[-1].t)
    assert [(question.call.step, question.call.steps) for question in nets.student.questions] == [
        (i, 4) for i in range(4)
    ]


def test_stored_states_are_those_of_the_shifted_times() -> None:
    times = uniform_grid(4, 5.0)
    states = torch.stack([clips(f"state {i}", 64) for i in range(5)], 1)
    batch = Batch(cond_of(1, 64), cond_of(0, 64), SHAPE, pairs=Pairs(states, times))
    rolled = FromPairs(shift=5.0)(asked(student=FreeClips((64, *SHAPE))).student, batch, Rng(0), grad=True)
    assert sorted(set(rolled.t.tolist())) == pytest.approx(sorted(times[:-1]))
    for row, t in enumerate(rolled.t.tolist()):
        assert torch.equal(rolled.x_t[row], states[row, [abs(t - stored) < 1e-6 for stored in times].index(True)])


# --- consistency ------------------------------------------------------------------------------------------------------


def consistency_nets(size: int = B) -> Nets:
    return asked(
        student=FreeClips((size, *SHAPE)), teacher=GaussianTeacher(MEANS, 0.4), target=GaussianTeacher(OTHER, 0.5)
    )


@pytest.mark.parametrize("huber", [1e-3, 0.5])
def test_consistency_compares_two_points_of_one_guided_step(huber: float) -> None:
    method = Consistency(intervals=6, skip=2, shift=3.0, guidance=CFG(scale=2.5), huber=huber, steps=(1, 2))
    table = AffineTableStudent(uniform_grid(6, 3.0)).fill([(0.1 * i, 0.5 - 0.1 * i) for i in range(7)])
    nets, batch = Nets({**consistency_nets(), **asked(target=table)}), make_batch()
    loss = terms(method.student_loss(nets, batch, Rng(4)))["consistency"]
    (seen,), (there,) = nets.student.questions, nets.target.questions
    noise_of(seen, batch.require("x0"))
    grid = f64(*uniform_grid(6, 3.0))
    place = (seen.t[:, None] - grid).abs().argmin(1)
    s = grid[(place + 2).clamp_max(6)]
    assert 0 in s.tolist() and len(set(s.tolist())) > 1, "both cases are looked at"
    torch.testing.assert_close(seen.t, grid[place])
    torch.testing.assert_close(there.t, s)
    assert seen.labels == there.labels == LABELS and seen.grad and not there.grad
    cond, t_, s_ = conds_of(LABELS), seen.t.reshape(-1, 1, 1, 1, 1), s.reshape(-1, 1, 1, 1, 1)
    plain, free = (nets.teacher.net(seen.x_t, seen.t, c) for c in (cond, cond_of(0, B)))
    x0, flow = (getattr(free, k) + 2.5 * (getattr(plain, k) - getattr(free, k)) for k in ("x0", "flow"))
    torch.testing.assert_close(there.x_t, (seen.x_t + (s_ - t_) * flow).detach())
    target = torch.where(s_ == 0, x0, nets.target.net(there.x_t, s, cond).x0)
    error = nets.student.net.clips - target
    torch.testing.assert_close(loss, ((error.square() + huber**2).sqrt() - huber).mean())


def test_consistency_is_trained_at_every_time_of_its_shifted_grid() -> None:
    nets = consistency_nets(64)
    batch = Batch(cond_of(1, 64), cond_of(0, 64), SHAPE, x0=clips("real", 64))
    terms(Consistency(intervals=4, shift=3.0).student_loss(nets, batch, Rng(0)))
    assert sorted(set(nets.student.questions[0].t.tolist())) == pytest.approx(sorted(uniform_grid(4, 3.0)[:-1]))


def test_consistency_averages_the_student_into_the_target_after_its_step() -> None:
    trained, averaged = Consistency(decay=0.9).updates(0)
    assert isinstance(trained, Update) and trained.roles == ("student",)
    assert averaged == Sync(target="target", source="student", decay=0.9)


def test_consistency_is_sampled_with_fresh_noise_on_its_shifted_grids() -> None:
    contract = Consistency(shift=3.0).contract(TEACHER)
    assert contract.trained == {n: uniform_grid(n, 3.0) for n in (1, 2, 4)}
    assert (contract.sampler, contract.grid.free) == (Renoise(), Shifted(shift=3.0))
    assert (contract.steps, contract.guidance) == (4, CFG())


# --- progressive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RF, Trig()], ids=lambda p: type(p).__name__)
def test_progressive_regresses_two_guided_steps_weighted_by_the_truncated_snr(path: NoisePath) -> None:
    method = Progressive(stages=((4, 1), (2, 1)), shift=0.5, guidance=CFG(scale=2.5))
    nets = asked(student=FreeClips((B, *SHAPE), path), stage=GaussianTeacher(MEANS, 0.4, path))
    batch, grid = make_batch(), f64(*uniform_grid(8, 0.5))
    (update,) = method.updates(0)
    loss = terms(update.losses(nets, batch, Rng(7)))["halving"]
    (seen,), (first, second) = nets.student.questions, nets.stage.questions
    assert seen.labels == LABELS and seen.grad and not first.grad and not second.grad
    assert first.labels == second.labels == LABELS + [0] * B, "both half-steps are guided"
    place = (seen.t[:, None] - grid).abs().argmin(1)
    assert (place % 2 == 0).all() and len(set(place.tolist())) > 2
    torch.testing.assert_close(seen.t, grid[place])
    torch.testing.assert_close(second.t, grid[place + 1].repeat(2))
    cond, null, s = conds_of(LABELS), cond_of(0, B), grid[place + 2]
    guided = method.guidance(nets.stage.net, seen.x_t, seen.t, cond, null)
    torch.testing.assert_close(second.x_t[:B], guided.step_to(grid[place + 1]).detach())
    end = method.guidance(nets.stage.net, second.x_t[:B], grid[place + 1], cond, null)
    here, there = path.at(seen.t, end.x0), path.at(s, end.x0)
    ratio = there.s / here.s
    target = (end.step_to(s) - ratio * seen.x_t) / (there.a - ratio * here.a)
    target = torch.where(s.reshape(-1, 1, 1, 1, 1) == 0, end.x0, target)
    weight = (here.a / here.s).square().clamp_min(1)
    assert (weight > 1).any() and (weight == 1).any(), "both sides of the truncation are looked at"
    torch.testing.assert_close(loss, (weight * (nets.student.net.clips - target).square()).mean())


def test_progressive_is_trained_at_every_time_of_a_stage() -> None:
    nets = asked(student=FreeClips((64, *SHAPE)), stage=GaussianTeacher(MEANS, 0.4))
    batch = Batch(cond_of(1, 64), cond_of(0, 64), SHAPE, x0=clips("real", 64))
    terms(Progressive(shift=3.0).student_loss(4, CFG(), nets, batch, Rng(0)))
    assert sorted(set(nets.student.questions[0].t.tolist())) == pytest.approx(sorted(uniform_grid(4, 3.0)[:-1]))


def test_progressive_is_sampled_by_ddim_on_the_shifted_grid_of_its_stage() -> None:
    method = Progressive(stages=((4, 3), (2, 2), (1, 1)), shift=3.0)
    for contract, steps in ((method.contract(TEACHER), 1), (method.contract_at(TEACHER, 4), 2)):
        assert contract.trained == {steps: uniform_grid(steps, 3.0)}
        assert (contract.sampler, contract.grid.free) == (DDIM(), Shifted(shift=3.0))
        assert (contract.steps, contract.guidance) == (steps, CFG())


def test_progressive_refuses_a_run_that_does_not_reach_its_last_stage() -> None:
    method = Progressive(stages=((4, 3), (2, 2), (1, 10)))
    with pytest.raises(ValueError, match="begins after 5 iterations; give it 15, or at least 6"):
        method.check(5)
    method.check(6)


def test_progressive_takes_the_student_over_once_per_stage() -> None:
    method = Progressive(stages=((4, 3), (2, 2), (1, 1)))
    events = [list(method.updates(step)) for step in range(8)]
    synced = {step: [e for e in each if isinstance(e, Sync)] for step, each in enumerate(events) if len(each) > 1}
    assert synced == {3: [Sync("stage", "student")], 5: [Sync("stage", "student")]}
    assert all(isinstance(events[step][0], Sync) for step in (3, 5)), "before the first update of the stage"


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_flow_matching_drops_conditions_clip_by_clip_at_the_stated_rate() -> None:
    size = 2000
    nets = asked(student=GaussianTeacher(MEANS, 0.4))
    batch = Batch(cond_of(1, size), cond_of(0, size), (1, 1, 1, 1), x0=Rng(0).randn((size, 1, 1, 1, 1), "x0").double())
    terms(FlowMatching(cond_drop=0.2).student_loss(nets, batch, Rng(0)))
    dropped = nets.student.questions[0].labels.count(0) / size
    assert 0.16 < dropped < 0.24


def test_flow_matching_regresses_the_velocity_at_times_of_its_density() -> None:
    nets, batch = asked(student=GaussianTeacher(MEANS, 0.4)), make_batch()
    loss = terms(FlowMatching(cond_drop=0.0, density=TimeGrid(times=(0.25,))).student_loss(nets, batch, Rng(0)))["flow"]
    (seen,), x0 = nets.student.questions, batch.require("x0")
    assert seen.t.tolist() == [0.25] * B and seen.labels == LABELS
    answer = nets.student.net(seen.x_t, seen.t, conds_of(LABELS)).flow
    torch.testing.assert_close(loss, (answer - (noise_of(seen, x0) - x0)).square().mean())


def test_single_frames_keep_the_condition_of_their_clip() -> None:
    nets, batch = asked(student=GaussianTeacher(MEANS, 0.4)), make_batch()
    terms(FlowMatching(cond_drop=0.0, image_fraction=1.0, images_per_clip=2).student_loss(nets, batch, Rng(0)))
    assert nets.student.questions[0].labels == [label for label in LABELS for _ in range(2)]


def test_images_come_in_the_stated_share_of_iterations_and_in_every_process_at_once() -> None:
    method, batch = FlowMatching(image_fraction=0.25), make_batch()
    shown: dict[int, list[int]] = {0: [], 1: []}
    for place, frames in shown.items():
        for step in range(120):
            nets = asked(student=GaussianTeacher(MEANS, 0.4))
            terms(method.student_loss(nets, batch, Rng(0, step, place)))
            frames.append(nets.student.questions[0].x_t.shape[2])
    assert shown[0] == shown[1]
    assert 0.15 < shown[0].count(1) / 120 < 0.35


# --- regression on stored pairs, and the small encoders -----------------------------------------------------------------


@pytest.mark.parametrize("huber", [None, 0.0, 0.5])
def test_knowledge_distillation_regresses_the_stored_end(huber: float | None) -> None:
    states = torch.stack([clips("start"), clips("end")], 1)
    nets, batch = asked(student=FreeClips((B, *SHAPE))), make_batch(pairs=Pairs(states, (1.0, 0.0)))
    method = KnowledgeDistillation(rollout=FromPairs(grids=((1.0,),)), huber=huber)
    loss = terms(method.student_loss(nets, batch, Rng(0)))["endpoint"]
    error = nets.student.net.clips - states[:, 1]
    expected = error.square() if huber is None else (error.square() + huber**2).sqrt() - huber
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    assert nets.student.net.clips.grad is not None and nets.student.questions[0].labels == LABELS


class Halving(nn.Module):
    """A codec that scales: latents are half of the frames. What it decodes gets brighter by so much per row and column."""

    def __init__(self, down: float = 0.0, right: float = 0.0) -> None:
        super().__init__()
        self.gain, self.decoded = nn.Parameter(f64(0.5)), []
        self.slope = (torch.arange(32) * down)[:, None] + torch.arange(32) * right

    def encode_raw(self, frames: Tensor) -> Tensor:
        return frames * self.gain

    def decode_raw(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return latents / 0.5 + self.slope


def test_reconstruction_is_the_stated_sum_on_noised_latents() -> None:
    frames = torch.rand(6, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    batch = Batch(cond_of(1, 6), cond_of(0, 6), SHAPE, frames=frames)
    codec = Halving()
    losses = terms(
        Reconstruction(frames_per_clip=5, gradient=2.0, noise=0.1, penalty=0.25).student_loss(
            Nets({"student": codec}), batch, Rng(0)
        )
    )
    shown = frames.transpose(1, 2).flatten(0, 1)
    spread = 0.1 * float((shown / 2).std())
    mean_of_folded_normal = (2 / torch.pi) ** 0.5
    assert float(losses["pixels"].detach()) == pytest.approx(2 * spread * mean_of_folded_normal, rel=0.02)
    assert float(losses["edges"].detach()) == pytest.approx(
        2.0 * 2 * 2 * spread * 2**0.5 * mean_of_folded_normal, rel=0.02
    )
    assert float(losses["latents"].detach()) == pytest.approx(0.25 * float((shown / 2).square().mean()), rel=1e-6)
    (latents,) = codec.decoded
    by_gain = torch.autograd.grad(latents.sum(), codec.gain)[0].sum()
    torch.testing.assert_close(by_gain, frames.sum())  # nothing through the size of the noise


def test_reconstruction_compares_edges_in_both_directions() -> None:
    frames = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    batch, method = Batch(cond_of(1, 2), cond_of(0, 2), SHAPE, frames=frames), Reconstruction(noise=0.0, gradient=2.0)
    losses = terms(method.student_loss(Nets({"student": Halving(down=0.2, right=0.1)}), batch, Rng(0)))
    assert float(losses["edges"].detach()) == pytest.approx(2.0 * (0.2 + 0.1))
    assert float(losses["pixels"].detach()) == pytest.approx(15.5 * (0.2 + 0.1))


class Reader(nn.Module):
    """An encoder whose logits are given; it notes the frames it is shown."""

    def __init__(self, logits: list[Tensor]) -> None:
        super().__init__()
        self.logits, self.shown = logits, []

    def encode(self, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return prompts

    def classify(self, what: Tensor) -> list[Tensor]:
        self.shown.append(what)
        return self.logits


@pytest.mark.parametrize("of", ["text", "features"])
def test_reading_attributes_sums_the_cross_entropy_of_all(of: str) -> None:
    logits = [Rng(0).randn((B, size), f"logits {size}") for size in (3, 5)]
    labels = torch.tensor([[0, 4], [1, 3], [2, 2], [0, 0]])
    frames, reader = torch.zeros(B, 3, 4, 16, 16), Reader(logits)
    batch = Batch(conds_of(LABELS), cond_of(0, B), SHAPE, prompts=("a",) * B, frames=frames, labels=labels)
    loss = terms(ReadAttributes(of=of, noise=0.3).student_loss(Nets({"student": reader}), batch, Rng(0)))["attributes"]  # type: ignore[arg-type]
    expected = sum(-one.log_softmax(1)[range(B), labels[:, i]].mean() for i, one in enumerate(logits))
    torch.testing.assert_close(loss, expected)
    if of == "features":
        grain = reader.shown[0].flatten(1).std(1)
        assert bool((grain < 0.32).all()) and float(grain.max() - grain.min()) > 0.03, "each clip has its own"
