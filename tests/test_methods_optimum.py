"""Every method reaches the student that theory says it should, on Gaussian teachers in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fewstep.core import Pairs, Rng
from fewstep.diffusion import CFG, VP, Contract, NoisePath, Stream, Trig, from_x0, uniform_grid
from fewstep.methods import (
    DMD2,
    Adversary,
    Consistency,
    FromPairs,
    KnowledgeDistillation,
    Nets,
    Progressive,
    SelfForced,
    TeacherForced,
)  # fmt: skip
from fewstep.methods.progressive import landing
from support_gaussian import (
    ONE_STEP,
    RF,
    AffineTableStudent,
    Counting,
    ExactCritic,
    GaussianTeacher,
    f64,
    make_batch,
    minimise,
    normal,
    run,
    stored_pairs,
    terms,
)  # fmt: skip

MEANS, STD = f64(-0.2, 0.7), 0.4
paths = pytest.mark.parametrize("path", [RF, Trig()], ids=lambda p: type(p).__name__)


def check_table(student: AffineTableStudent, rows: list[tuple[float, float]], tolerance: float) -> None:
    got = torch.stack([student.scale, student.offset], 1).detach()
    torch.testing.assert_close(got, f64(*(v for row in rows for v in row)).reshape(-1, 2), rtol=0, atol=tolerance)


# --- knowledge distillation -------------------------------------------------------------------------------------------


@paths
def test_kd_fits_the_teachers_composition(path: NoisePath) -> None:
    teacher, grid = GaussianTeacher(MEANS, STD, path), uniform_grid(8)
    batch = make_batch(64, pairs=stored_pairs(teacher, normal(64), 8))
    student = AffineTableStudent(grid[:-1:2], path)
    run(KnowledgeDistillation(huber=None), Nets({"student": student}), batch, 1, minimise)
    check_table(student, [teacher.compose_affine(grid[i:], 0.7) for i in (0, 2, 4, 6)], 1e-8)


def test_kd_on_shuffled_pairs_collapses_to_the_mean() -> None:
    """Each noise is paired with an endpoint and with its mirror image, so noise and endpoint are uncorrelated."""
    pairs = stored_pairs(GaussianTeacher(MEANS, STD), normal(64), 8)
    ends, starts = pairs.states[:, -1], pairs.states[:, :-1]
    mirrored = torch.cat([torch.cat([starts, e[:, None]], 1) for e in (ends, 2 * ends.mean() - ends)])
    student = AffineTableStudent((1.0,))
    method = KnowledgeDistillation(rollout=FromPairs(grids=((1.0,),)), huber=None)
    run(method, Nets({"student": student}), make_batch(128, pairs=Pairs(mirrored, pairs.times)), 1, minimise)
    check_table(student, [(0.0, float(ends.mean()))], 1e-8)


# --- progressive distillation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RF, Trig(), VP()], ids=lambda p: type(p).__name__)
def test_pd_target_lands_on_two_teacher_steps(path: NoisePath) -> None:
    x_u, x_s = normal(3, "u"), normal(3, "s")
    u, s = f64(1.0, 0.7, 0.3), f64(0.5, 0.2, 0.1)
    target = landing(x_u, u, x_s, s, path)
    torch.testing.assert_close(from_x0(target, x_u, u, path).step_to(s), x_s, rtol=0, atol=1e-12)


def test_pd_target_is_the_average_velocity_on_rectified_flow() -> None:
    x_u, x_s, u, s = normal(2, "u"), normal(2, "s"), f64(1.0, 0.6), f64(0.5, 0.2)
    velocity = (x_u - x_s) / (u - s).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(landing(x_u, u, x_s, s, RF), x_u - u.reshape(2, 1, 1, 1, 1) * velocity)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("path", [RF, Trig(), VP(low=-14.0)], ids=lambda p: type(p).__name__)
def test_pd_from_four_to_one_is_the_four_step_teacher(path: NoisePath, scale: float) -> None:
    teacher = GaussianTeacher(MEANS, STD, path).requires_grad_(False)
    student = AffineTableStudent((1.0, 0.5), path)
    method = Progressive(stages=((2, 1), (1, 1)), guidance=CFG(scale=scale))
    nets = Nets({"student": student, "stage": teacher, "teacher": teacher})
    run(method, nets, make_batch(64, x0=0.7 + STD * normal(64)), 2, minimise)
    mean = teacher.guided_mean(scale)
    a, b = teacher.compose_affine(uniform_grid(4), mean)
    check_table(student, [(a, b), teacher.compose_affine((0.5, 0.25, 0.0), mean)], 1e-8)
    assert abs(a - float(teacher.flow_map(f64(1.0), 1.0, 0.0, 0.0))) > 1e-2, "the ODE map is another one"


def test_pd_is_guided_in_the_first_stage_only() -> None:
    method = Progressive(stages=((2, 1), (1, 1)), guidance=CFG(scale=2.0))
    sizes = []
    for step in range(2):
        stage = Counting(GaussianTeacher(MEANS, STD))
        nets = Nets({"student": AffineTableStudent((1.0, 0.5)), "stage": stage})
        terms(list(method.updates(step))[-1].losses(nets, make_batch(4, x0=normal(4)), Rng(0)))
        sizes.append([len(x) for _, x, _ in stage.calls])
    assert sizes == [[8, 8], [4, 4]]


def test_pd_changes_stage_on_time() -> None:
    method = Progressive(stages=((4, 3), (2, 2), (1, 1)))
    synced = [step for step in range(10) if len(list(method.updates(step))) == 2]
    assert synced == [3, 5]
    counts = [method.contract_at(Contract(), step).counts for step in (0, 2, 3, 5, 9)]
    assert counts == [(4,), (4,), (2,), (1,), (1,)] and method.contract(Contract()).counts == (1,)
    with pytest.raises(ValueError, match="half the steps"):
        Progressive(stages=((4, 1), (1, 1)))


@pytest.mark.parametrize("stages", [((2, 0), (1, 5)), ((2, 5), (1, 0))])
def test_pd_refuses_stages_without_iterations(stages: tuple[tuple[int, int], ...]) -> None:
    """A first stage of none would leave out guidance, in silence."""
    said = r"stage of \d steps has no iterations.*at least 1 iteration, or leave it out|stages\[1\]\[1\] must be at least 0"
    with pytest.raises(ValueError, match=said):
        Progressive(stages=stages)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Progressive(stages=((4, 3), (2, -1), (1, 5)))


# --- consistency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@paths
def test_consistency_fixed_point_is_the_ddim_composition(path: NoisePath, scale: float, skip: int) -> None:
    teacher, grid = GaussianTeacher(MEANS, STD, path), uniform_grid(8)
    mean = teacher.guided_mean(scale)
    method = Consistency(intervals=8, skip=skip, guidance=CFG(scale=scale))
    ddim = [teacher.compose_affine((*grid[i:-1:skip], 0.0), mean) for i in range(8)]
    ode = []
    for t in grid[:-1]:
        at_zero, at_one = (float(teacher.flow_map(f64(x), t, 0.0, mean)) for x in (0.0, 1.0))
        ode.append((at_one - at_zero, at_zero))
    losses = []
    for rows in (ddim, ode):
        table = AffineTableStudent(grid[:-1], path).fill(rows)
        nets = Nets({"student": table, "target": table, "teacher": teacher})
        batch = make_batch(64, x0=0.7 + STD * normal(64))
        losses.append(terms(method.student_loss(nets, batch, Rng(0)))["consistency"].item())
    assert losses[0] < 1e-14
    assert losses[1] > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_consistency_offers_only_what_it_trains(shift: float) -> None:
    method = Consistency(intervals=12, steps=(1, 2, 3, 4, 6, 12), shift=shift)
    trained = uniform_grid(method.intervals, shift)
    contract = method.contract(Contract())
    for count in contract.counts:
        assert all(min(abs(t - u) for u in trained) < 1e-12 for t in contract.times(count)), count


@pytest.mark.parametrize("steps", [(5,), (1, 2, 24), ()])
def test_consistency_refuses_steps_off_its_grid(steps: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"12 intervals .* trained only for 1, 2, 3, 4, 6, 12 steps|steps\[0\] must be at least 1"
    ):
        Consistency(intervals=12, steps=steps)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Consistency(intervals=12, steps=(0, 1))


def test_the_target_of_consistency_trails_the_student() -> None:
    """After each step it has gone the stated share of the way to where the student is now."""
    method, times = Consistency(intervals=4, decay=0.75, guidance=CFG()), uniform_grid(4)[:-1]
    teacher, start = GaussianTeacher(MEANS, STD).requires_grad_(False), [(0.3, 0.1)] * 4
    nets = Nets({"student": AffineTableStudent(times).fill(start), "target": AffineTableStudent(times).fill(start),
                 "teacher": teacher})  # fmt: skip

    def descend(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> None:
        torch.optim.SGD(parameters, lr=0.1).zero_grad()
        loss().backward()
        torch.optim.SGD(parameters, lr=0.1).step()

    expected = nets.target.offset.detach().clone()
    for _ in range(3):
        nets = run(method, nets, make_batch(64, x0=0.7 + STD * normal(64)), 1, descend)
        expected = 0.75 * expected + 0.25 * nets.student.offset.detach()
        torch.testing.assert_close(nets.target.offset.detach(), expected)
    assert (nets.student.offset - 0.1).abs().max() > 1e-3


def test_known_values_of_the_composition() -> None:
    teacher = GaussianTeacher(MEANS, STD)
    for steps, expected in ((4, 1.0377), (48, 1.2025)):
        a, b = teacher.compose_affine(uniform_grid(steps), 0.7)
        assert abs(a * 1.3 + b - expected) < 5e-5
    assert abs(float(teacher.flow_map(f64(1.3), 1.0, 0.0, 0.7)) - 1.22) < 1e-12


# --- distribution matching --------------------------------------------------------------------------------------------


def one_step_nets(scale: float, offset: float) -> Nets:
    student = AffineTableStudent((1.0,)).fill([(scale, offset)])
    return Nets({"student": student, "teacher": GaussianTeacher(MEANS, STD), "critic": ExactCritic(student)})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_dmd2_reaches_the_guided_mean(scale: float) -> None:
    """Student of the right variance, optimal critic: the fixed point is `m_c + (w - 1)(m_c - m_null)` at every t."""
    nets = one_step_nets(STD, -1.0)
    method = DMD2(rollout=ONE_STEP, guidance=CFG(scale=scale))
    optimiser = torch.optim.Adam([nets.student.offset], lr=0.02)
    for step in range(500):
        optimiser.zero_grad()
        terms(method.student_loss(nets, make_batch(16), Rng(0, step)))["matching"].backward()
        optimiser.step()
    assert abs(nets.student.offset.item() - (0.7 + (scale - 1) * (0.7 - -0.2))) < 1e-3


@pytest.mark.parametrize("start", [-1.0, 2.0])
def test_dmd2_descends_towards_the_teacher(start: float) -> None:
    nets = one_step_nets(STD, start)
    method = DMD2(rollout=ONE_STEP, guidance=CFG())
    terms(method.student_loss(nets, make_batch(16), Rng(0)))["matching"].backward()
    assert (float(nets.student.offset.grad) > 0) == (start > 0.7)


def test_dmd2_widens_a_student_that_is_too_narrow() -> None:
    nets = one_step_nets(0.1, 0.7)
    method = DMD2(rollout=ONE_STEP, guidance=CFG())
    terms(method.student_loss(nets, make_batch(256), Rng(0)))["matching"].backward()
    assert float(nets.student.scale.grad) < 0


def test_dmd2_student_turn_touches_the_student_only_with_one_grad_call() -> None:
    table = AffineTableStudent((1.0, 0.75, 0.5, 0.25)).fill([(0.3, 0.1)] * 4)
    nets = Nets({r: Counting(n) for r, n in {"student": table, "teacher": GaussianTeacher(MEANS, STD),
                                             "critic": GaussianTeacher(MEANS + 1, STD)}.items()})  # fmt: skip
    for step in range(8):
        nets.student.calls.clear()
        terms(DMD2().student_loss(nets, make_batch(4), Rng(0, step)))["matching"].backward()
        assert sum(grad for grad, _, _ in nets.student.calls) == 1
    assert table.offset.grad is not None
    assert all(p.grad is None for role in ("teacher", "critic") for p in nets[role].parameters())


def test_dmd2_order_and_number_of_updates() -> None:
    method = DMD2(critic_updates=3, warmup=2)
    assert [u.roles for u in method.updates(2)] == [("critic",)] * 3 + [("student",)]
    assert [u.roles for u in method.updates(1)] == [("critic",)] * 3
    adversarial = DMD2(critic_updates=1, adversary=Adversary())
    assert [u.roles for u in adversarial.updates(0)] == [("critic", "discriminator"), ("student",)]


def test_dmd2_critic_turns_see_fresh_samples() -> None:
    nets = one_step_nets(STD, 0.0)
    counting = Nets({**nets, "student": Counting(nets.student)})
    for update in DMD2(critic_updates=2, rollout=ONE_STEP).updates(0):
        terms(update.losses(counting, make_batch(4), Rng(0)))
    inputs = [x for _, x, _ in counting.student.calls]
    assert len(inputs) == 3
    assert [grad for grad, _, _ in counting.student.calls] == [False, False, True]
    assert not any(torch.equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])


def test_dmd2_needs_follow_its_fields_and_costs_follow_the_paper() -> None:
    assert DMD2().needs == {"prompts"}
    assert DMD2(adversary=Adversary()).needs == {"prompts", "x0"}
    assert DMD2(anchor=0.25).needs == {"prompts", "pairs"}
    forwards = {n: sum(work.forwards for work in DMD2(critic_updates=n).cost()) for n in (1, 5)}
    assert forwards == {1: 7.5 + 5.5, 5: 7.5 + 5 * 5.5}
    two = Stream(chunks=(2,))
    chunked = DMD2(rollout=SelfForced(stream=two), anchor_rollout=FromPairs(history=TeacherForced(stream=two)))
    for method, more in ((DMD2(), 3), (chunked, 6)):
        plain, anchored = (sum(work.forwards for work in m.cost()) for m in (method, replace(method, anchor=0.25)))
        assert anchored - plain == pytest.approx(more)


def test_an_anchor_trains_a_student_of_the_same_kind() -> None:
    two, three = (FromPairs(history=TeacherForced(stream=Stream(chunks=(n,)))) for n in (2, 3))
    forced = SelfForced(stream=Stream(chunks=(2,)))
    DMD2(rollout=forced, anchor=0.25, anchor_rollout=two)
    DMD2(rollout=forced, anchor_rollout=three)  # it is off
    for rollout, stored, words in (
        (ONE_STEP, two, r"chunks of \[2\] latent frames, and the method's rollout .* whole clips"),
        (forced, three, r"of \[3\] latent frames, and .* \[2\] latent frames; give both the same stream"),
        (forced, FromPairs(), r"a student of whole clips, and .* chunks of \[2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            DMD2(rollout=rollout, anchor=0.25, anchor_rollout=stored)


def test_dmd2_anchor_is_zero_for_the_exact_pairs() -> None:
    teacher = GaussianTeacher(MEANS, STD)
    pairs = stored_pairs(teacher, normal(32), 8)
    student = AffineTableStudent((1.0,)).fill([teacher.compose_affine(uniform_grid(8), 0.7)])
    nets = Nets({"student": student, "teacher": teacher, "critic": ExactCritic(student)})
    method = DMD2(rollout=ONE_STEP, anchor=1.0, anchor_rollout=FromPairs(grids=((1.0,),)))
    losses = terms(method.student_loss(nets, make_batch(32, pairs=pairs), Rng(0)))
    assert losses["anchor"].item() < 1e-12
    assert losses["matching"].item() > 1e-12


def test_dmd2_anchor_moves_the_student_to_the_stored_end() -> None:
    pairs = stored_pairs(GaussianTeacher(MEANS, STD), normal(32), 8)
    nets = one_step_nets(STD, 0.0)
    method = DMD2(rollout=ONE_STEP, anchor=0.25, anchor_rollout=FromPairs(grids=((1.0,),)))
    terms(method.student_loss(nets, make_batch(32, pairs=pairs), Rng(0)))["anchor"].backward()
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in nets.student.parameters())
