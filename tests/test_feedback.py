"""PSO, GRPO and their turns with distillation: likelihoods of a student's own random steps, and what moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core import Batch, Call, Cond, Rng
from fewstep.diffusion import DDIM, Contract, Prediction
from fewstep.engine.outline import Outline
from fewstep.methods import (
    DMD2,
    GRPO,
    PSO,
    TDM,
    Alternating,
    BackwardSimulation,
    Copy,
    MotionReward,
    Nets,
    Reconstruction,
    Reward,
    Role,
    Sync,
    TwinFlow,
    Update,
    WorldReward,
    targets,
)
from fewstep.methods.feedback.grpo import log_ratio
from fewstep.methods.feedback.random_step import RandomStep
from support_engine import FRAMES, small, stored_card, tiny_model
from support_gaussian import ONE_STEP, RF, AffineTableStudent, Asked, cond_of, f64, minimise, terms

B, SHAPE = 3, (2, 3, 2, 2)
GRID = (1.0, 0.5)
TWO = BackwardSimulation(grids=(GRID,))


class Shifted(nn.Module):
    """A student whose prediction is `x_t / 2 + offset`: the offset's gradient is what the loss puts on its clips."""

    def __init__(self, offset: Tensor | None = None) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(B, *SHAPE, dtype=torch.float64) if offset is None else offset.clone())
        self.path = RF

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return Prediction(x_t / 2 + self.offset, "x0", x_t, t, self.path)


class Plain(nn.Module):
    """A codec whose latents are frames of a hundredth of their size, so that none is clamped."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 100


@dataclass(frozen=True, kw_only=True)
class Linear(Reward):
    """100 times the mean of the frames: the mean of the latents."""

    sign: float = 1.0

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        return 100 * self.sign * frames.flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Blind(Reward):
    """A reward that does not look: by the number of the question, `values` in turn."""

    values: tuple[float, ...]

    def score(self, frames: Tensor, batch: Batch, nets: Nets) -> Tensor:
        nets.asked.append(1)
        return torch.full((len(frames),), self.values[(len(nets.asked) - 1) % len(self.values)], dtype=torch.float64)


def noise(name: str) -> Tensor:
    return Rng(5).randn((B, *SHAPE), name).double()


def batch(**facts: Any) -> Batch:
    return Batch(cond_of(1, B), cond_of(0, B), SHAPE, **facts)


def nets(student: nn.Module, other: str, before: nn.Module | None = None) -> Nets:
    made = before or Shifted()
    return Nets({"student": student, other: made.requires_grad_(False), "codec": Plain()})


def found(
    method: PSO | GRPO, student: Shifted, before: nn.Module | None = None, rng: Rng = Rng(0)
) -> tuple[float, Tensor]:
    """The loss, and its gradient in the student's offset."""
    student.zero_grad()
    given = batch(x0=noise("data")) if "x0" in method.needs else batch()
    made = nets(student, "reference" if isinstance(method, PSO) else "old", before)
    (loss,) = terms(method.student_loss(made, given, rng)).values()
    loss.backward()
    assert student.offset.grad is not None
    return float(loss.detach()), student.offset.grad


# --- the loss of a pair -----------------------------------------------------------------------------------------------


def test_the_loss_of_a_pair_is_that_of_the_paper() -> None:
    """Eq. 10 as it is printed, with squares; ours has none to lose digits in."""
    win, lose, mean, reference = (noise(name) for name in ("w", "l", "m", "r"))
    beta, sd = 3.0, f64(0.5, 0.8, 1.0)

    def square(x: Tensor) -> Tensor:
        return x.square().flatten(1).mean(1)

    delta = [square(y - reference) - square(y - mean) for y in (win, lose)]
    printed = -torch.sigmoid(beta * (delta[0] - delta[1]) / (2 * sd**2)).log().mean()
    torch.testing.assert_close(
        targets.preference(win, lose, mean, reference, beta / sd**2), printed, rtol=0, atol=1e-12
    )


def test_it_holds_its_digits_where_squares_lose_them() -> None:
    mean = torch.full((1, 4), 3000.0)
    exact = targets.preference(mean + 1, mean - 1, mean + 1e-3, mean, 1.0)
    want = math.log1p(math.exp(-2 * float((mean + 1e-3 - mean)[0, 0])))
    assert float(exact) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("exit", [0, 1])
def test_at_the_reference_the_loss_is_log_two_and_its_gradient_along_the_pair(exit: int) -> None:
    """Offline: `y_w - y_l` is a_s times what the data have and the student does not, at each of the student's times."""
    rng = next(r for r in (Rng(0, step) for step in range(20)) if r.integer("exit", 2) == exit)
    method = PSO(rollout=TWO, beta=7.0, temperature=0.3)
    loss, grad = found(method, Shifted(), rng=rng)
    assert loss == pytest.approx(math.log(2), abs=1e-12)
    t, signal, sd = ((1.0, 0.5, 0.5), (0.5, 1.0, 0.3))[exit]
    x0 = noise("data")
    x_t = RF.add_noise(x0, rng.randn(x0.shape, "noise").double(), f64(*[t] * B))
    pair = signal * (x0 - x_t / 2)
    expected = -7.0 / sd**2 / 2 * signal * pair / (B * math.prod(SHAPE))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-7)


def test_what_the_student_gained_on_the_pair_makes_the_loss_smaller() -> None:
    loss, _ = found(PSO(rollout=TWO, beta=1.0), Shifted())
    x0 = noise("data")
    nearer, _ = found(PSO(rollout=TWO, beta=1.0), Shifted(0.3 * (x0 - x0 / 4)))
    farther, _ = found(PSO(rollout=TWO, beta=1.0), Shifted(-0.3 * (x0 - x0 / 4)))
    assert nearer < loss < farther


def test_in_one_step_the_deviation_is_a_temperature() -> None:
    """Offline the loss depends on beta / temperature^2 alone."""
    student = Shifted(0.1 * noise("away"))
    losses = [
        found(PSO(rollout=ONE_STEP, beta=beta, temperature=temperature), student)[0]
        for beta, temperature in ((4.0, 0.5), (16.0, 1.0), (16.0, 0.5))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0] != pytest.approx(losses[2], abs=1e-3)


# --- outcomes of the student's own step --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_outcomes_are_those_of_the_students_sampler(index: int) -> None:
    """Of all steps but the last: the same mean, and the same noise where it is given the sampler's."""
    grid, rng, student = (1.0, 0.6, 0.2), Rng(0), Shifted(0.1 * noise("o"))
    x, seen = noise("x"), []
    sampler = BackwardSimulation(grids=((*grid,),)).sampler
    for step in sampler.sampling(lambda x, t, call: student(x, t, cond_of(1, B), call), x, (*grid, 0.0), rng=rng):
        seen.append((x, step.x))
        x = step.x
    before, after = seen[index]
    made = RandomStep.at(before, grid, index, RF, 0.3, rng)
    eps = rng.randn(before.shape, f"renoise/{index}").double()
    torch.testing.assert_close(made.outcome(made.x0(student, batch()), eps), after)
    last = RandomStep.at(seen[2][0], grid, 2, RF, 0.3, rng)
    torch.testing.assert_close(last.outcome(seen[2][1], eps), seen[2][1] + 0.3 * eps)


def test_a_candidates_reward_is_that_of_the_clip_that_follows() -> None:
    """Of the student's next prediction at the next time and step; after the last step, of the outcome itself."""
    student, grid = Asked(Shifted(0.1 * noise("o"))), (1.0, 0.5, 0.25)
    made = nets(student, "reference")
    x0 = noise("clean")
    outcomes, r = RandomStep.at(noise("x"), grid, 1, RF, 0.3, Rng(0)).candidates(2, x0, Linear(), made, batch(), Rng(0))
    assert [(q.t.tolist(), q.call.step, q.call.steps, q.grad) for q in student.questions] == [
        ([0.25] * B, 2, 3, False)
    ] * 2
    follow = torch.stack([y / 2 + 0.1 * noise("o") for y in outcomes])
    torch.testing.assert_close(r, follow.flatten(2).mean(2))
    outcomes, r = RandomStep.at(noise("x"), grid, 2, RF, 0.3, Rng(0)).candidates(2, x0, Linear(), made, batch(), Rng(0))
    assert len(student.questions) == 2 and outcomes.shape == (2, B, *SHAPE)
    torch.testing.assert_close(r, outcomes.flatten(2).mean(2))
    assert not torch.equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_online_the_best_outcome_is_preferred_to_the_worst(exit: int, sign: float) -> None:
    """At the reference the gradient is along the pair, for the best and the worst of k by the reward."""
    rng = next(r for r in (Rng(0, step) for step in range(20)) if r.integer("exit", 2) == exit)
    method = PSO(rollout=TWO, reward=Linear(sign=sign), candidates=4, beta=7.0, temperature=0.3)
    student = Shifted()
    loss, grad = found(method, student, rng=rng)
    assert loss == pytest.approx(math.log(2), abs=1e-12)
    rolled = TWO(student, batch(), rng, grad=False)
    signal, sd = ((0.5, 0.5), (1.0, 0.3))[exit]
    made = torch.stack(
        [signal * rolled.x0 + sd * rng.randn(rolled.x0.shape, f"candidate/{i}") for i in range(4)]
    ).detach()
    order = (sign * made.flatten(2).mean(2)).argsort(0)
    rows = torch.arange(B)
    pair = made[order[-1], rows] - made[order[0], rows]
    torch.testing.assert_close(grad, -7.0 / sd**2 / 2 * signal * pair / (B * math.prod(SHAPE)), rtol=0, atol=1e-6)


def test_a_reward_that_does_not_look_moves_nothing_on_average_and_pulls_back_who_has_moved() -> None:
    """Both orders of two outcomes are as likely. At the reference their gradients cancel; elsewhere they point to it."""

    def both(student: Shifted) -> Tensor:
        total = torch.zeros(B, *SHAPE, dtype=torch.float64)
        for values in ((1.0, 0.0), (0.0, 1.0)):
            method = PSO(rollout=TWO, reward=Blind(values=values), beta=1.0)
            student.zero_grad()
            made = Nets({**nets(student, "reference"), "asked": []})  # type: ignore[dict-item]
            terms(method.student_loss(made, batch(), Rng(0)))["preference"].backward()
            assert student.offset.grad is not None
            total += student.offset.grad
        return total

    assert float(both(Shifted()).abs().max()) < 1e-15
    away = 0.2 * noise("away")
    assert float((both(Shifted(away)) * away).sum()) > 1e-4, "descent leads back"


def test_where_all_outcomes_are_as_good_there_is_no_gradient() -> None:
    student = Shifted(0.1 * noise("away"))
    made = Nets({**nets(student, "reference"), "asked": []})  # type: ignore[dict-item]
    method = PSO(rollout=TWO, reward=Blind(values=(2.0,)), candidates=3)
    terms(method.student_loss(made, batch(), Rng(0)))["preference"].backward()
    assert student.offset.grad is not None and not student.offset.grad.any()


# --- GRPO -------------------------------------------------------------------------------------------------------------


def test_the_ratio_is_that_of_gaussian_likelihoods() -> None:
    step = RandomStep.at(noise("x"), GRID, 0, RF, 0.3, Rng(0))
    x0, old = noise("new"), noise("old")
    outcomes = torch.stack([noise("y1"), noise("y2")])

    def log_likelihood(mean: Tensor) -> Tensor:
        normals = torch.distributions.Normal(step.signal * mean, step.deviation)
        return normals.log_prob(outcomes).flatten(2).mean(2)

    torch.testing.assert_close(log_ratio(step, outcomes, x0, old), log_likelihood(x0) - log_likelihood(old))


def test_grpo_follows_normalised_advantages_of_the_old_students_outcomes() -> None:
    rng = next(r for r in (Rng(0, step) for step in range(20)) if r.integer("exit", 2) == 0)
    student = Shifted()
    loss, grad = found(GRPO(rollout=TWO, reward=Linear(), candidates=5), student, rng=rng)
    rolled = TWO(student, batch(), rng, grad=False)
    eps = torch.stack([rng.randn(rolled.x0.shape, f"candidate/{i}").double() for i in range(5)])
    r = ((0.5 * rolled.x0 + 0.5 * eps) / 2).flatten(2).mean(2).detach()
    better = (r - r.mean(0)) / (r.std(0, correction=0) + 1e-6)
    score = 0.5 * eps / 0.5  # of the mean, times a_s: signal (y - m) / sd^2
    expected = -(better[:, :, None, None, None, None] * score).mean(0) / (B * math.prod(SHAPE))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6)
    assert loss == pytest.approx(0, abs=1e-7), "advantages of a group add up to nothing"


def test_grpo_without_a_difference_has_no_gradient() -> None:
    student = Shifted()
    made = Nets({**nets(student, "old"), "asked": []})  # type: ignore[dict-item]
    terms(GRPO(rollout=TWO, reward=Blind(values=(2.0,))).student_loss(made, batch(), Rng(0)))["policy"].backward()
    assert student.offset.grad is not None and not student.offset.grad.any()


def test_grpo_averages_to_nothing_if_the_reward_does_not_look() -> None:
    """Over all orders of the rewards, and so in expectation."""
    total, student = torch.zeros(B, *SHAPE, dtype=torch.float64), Shifted()
    for values in ((0.0, 1.0, 5.0), (1.0, 5.0, 0.0), (5.0, 0.0, 1.0)):
        student.zero_grad()
        made = Nets({**nets(student, "old"), "asked": []})  # type: ignore[dict-item]
        method = GRPO(rollout=TWO, reward=Blind(values=values), candidates=3)
        terms(method.student_loss(made, batch(), Rng(0)))["policy"].backward()
        assert student.offset.grad is not None and bool(student.offset.grad.any())
        total += student.offset.grad
    assert float(total.abs().max()) < 1e-15


@pytest.mark.parametrize(("ratio", "advantage", "moves"), [
    (1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True),
])  # fmt: skip
def test_an_outcome_that_has_moved_far_enough_is_left_alone(ratio: float, advantage: float, moves: bool) -> None:
    log = f64(math.log(ratio)).requires_grad_(True)
    loss = targets.clipped_policy(log, f64(advantage), 0.2)
    loss.backward()
    assert log.grad is not None
    assert float(log.grad) == pytest.approx(-ratio * advantage if moves else 0.0)
    assert float(loss.detach()) == pytest.approx(-advantage * (ratio if moves else 1 + 0.2 * (1 if ratio > 1 else -1)))


def test_candidates_of_grpo_come_from_the_old_student_which_is_renewed_in_time() -> None:
    old, student = Asked(Shifted(noise("old"))), Asked(Shifted())
    rng = next(r for r in (Rng(0, step) for step in range(20)) if r.integer("exit", 2) == 1)
    made = nets(student, "old", old)
    terms(GRPO(rollout=TWO, reward=Linear()).student_loss(made, batch(), rng))
    assert [q.grad for q in old.questions] == [False, False] and [q.grad for q in student.questions] == [True]
    renewed = [step for step in range(7) if Sync("old", "student") in list(GRPO(refresh=3).updates(step))]
    assert renewed == [0, 3, 6] and GRPO().aux()["old"] == Copy("student")


@pytest.mark.parametrize(
    "method", [PSO(rollout=TWO), PSO(rollout=TWO, reward=Linear()), GRPO(rollout=TWO, reward=Linear())]
)
def test_all_who_predict_a_step_are_given_the_rollouts_own_noise(method: PSO | GRPO) -> None:
    """A student whose head draws noise (`FlowHead`) is then the same function for all of them."""
    student, before = Asked(Shifted()), Asked(Shifted())
    made = nets(student, "reference" if isinstance(method, PSO) else "old", before)
    terms(method.student_loss(made, batch(x0=noise("data")), Rng(4)))
    used = {q.call.rng for q in (*student.questions, *before.questions)}
    assert len(used) == 1 and None not in used


def test_offline_steps_are_those_of_the_phase_at_shifted_times() -> None:
    rollout = BackwardSimulation(grids=((1.0, 0.75, 0.5, 0.25),), phase=(0.0, 0.5), shift=3.0)
    made = nets(Asked(Shifted()), "reference")
    steps = [PSO(rollout=rollout).noised(made, batch(x0=noise("data")), Rng(0, n))[0] for n in range(24)]
    assert {round(float(step.t[0]), 9) for step in steps} == {0.75, 0.5}  # 0.5 and 0.25, shifted
    assert {step.call.step for step in steps} == {2, 3}


# --- both and their turns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PSO, GRPO])
def test_steps_that_are_not_random_are_refused(method: type[PSO | GRPO]) -> None:
    with pytest.raises(ValueError, match="write sde"):
        method(rollout=BackwardSimulation(mode="ode"))
    with pytest.raises(ValueError, match="write rollout.grad_calls: 1, not 2"):
        method(rollout=BackwardSimulation(grad_calls=2))


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="leave it at 2"):
        PSO(candidates=4)
    with pytest.raises(ValueError, match="candidates must be at least 2"):
        PSO(candidates=1, reward=MotionReward())


def test_the_reference_is_the_student_as_it_began() -> None:
    role = PSO().aux()["reference"]
    assert role == Copy("student", frozen=True) and not role.trainable and role.origin == "student"
    assert PSO().needs == {"prompts", "x0"} and PSO(reward=MotionReward()).needs == {"prompts"}
    assert PSO(reward=WorldReward()).needs == {"prompts", "labels"} and set(PSO(reward=WorldReward()).aux()) == {
        "reference", "codec", "judge",
    }  # fmt: skip


def test_turns_have_their_ratio_and_their_own_count() -> None:
    method = Alternating(distillation=DMD2(critic_updates=1, warmup=1), reinforcement=GRPO(refresh=2), ratio=3)

    def kinds(step: int) -> list[str]:
        return ["sync" if isinstance(event, Sync) else "+".join(event.roles) for event in method.updates(step)]

    assert [kinds(step) for step in range(9)] == [
        ["critic"], ["sync", "student"], ["student"], ["sync", "student"],
        ["critic", "student"], ["student"], ["sync", "student"], ["student"],
        ["critic", "student"],
    ]  # fmt: skip
    update = list(method.updates(2))[-1]
    assert isinstance(update, Update) and update.losses == method.reinforcement.student_loss  # type: ignore[attr-defined]


def test_turns_have_what_both_need() -> None:
    method = Alternating(distillation=DMD2(critic_updates=1), reinforcement=PSO(reward=WorldReward()), ratio=3)
    assert method.needs == {"prompts", "labels"} and method.guidance == DMD2().guidance
    assert set(method.aux()) == {"critic", "reference", "codec", "judge"} and method.critic == "critic"
    costs = {"student": 0.0, "teacher": 0.0, "critic": 0.0, "reference": 0.0}
    for work in method.cost():
        costs[work.role] += work.forwards
    assert costs == {"student": (7 + 3 * 6.0) / 4, "teacher": 2 / 4, "critic": 4 / 4, "reference": 3 / 4}
    longer = replace(method, distillation=replace(method.distillation, warmup=4)).lengthened(2.0)
    assert longer.reinforcement == method.reinforcement


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Remembers what it was asked."""

    asked: list[int] = field(default_factory=list)

    def check(self, steps: int) -> None:
        self.asked.append(steps)

    def contract_at(self, teacher: Contract, step: int) -> Contract:
        return replace(teacher, steps=step)


@dataclass(frozen=True, kw_only=True)
class CheckedDMD2(_Checked, DMD2):
    """Of a check of its own."""


@dataclass(frozen=True, kw_only=True)
class CheckedPSO(_Checked, PSO):
    """Of a check of its own."""


class TwinPSO(PSO):
    """Changes the student as TwinFlow does."""

    transforms = TwinFlow.transforms


def test_turns_change_and_check_the_student_as_both_ask() -> None:
    rollout = BackwardSimulation(grids=((1.0,), (1.0, 0.5)))
    method = Alternating(distillation=TwinFlow(), reinforcement=PSO(rollout=rollout))
    assert method.transforms == TwinFlow.transforms
    assert replace(method, reinforcement=TwinPSO(rollout=rollout)).transforms == TwinFlow.transforms, "each change once"
    one, other = CheckedDMD2(), CheckedPSO(reward=MotionReward())
    both = Alternating(distillation=one, reinforcement=other, ratio=3)
    both.check(9)
    assert one.asked == [3] and other.asked == [6], "iterations 0, 4 and 8 of 9 distil"
    assert both.contract_at(Contract(), 8).steps == 2


def test_turns_of_two_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="the same grids, shift and mode"):
        Alternating(distillation=DMD2(rollout=ONE_STEP))
    with pytest.raises(ValueError, match="the same grids, shift and mode"):
        Alternating(distillation=TDM())
    assert Alternating().contract(Contract(sampler=DDIM())) == DMD2().contract(Contract())


def test_turns_are_of_a_distillation_and_a_reinforcement() -> None:
    for distillation, reinforcement in ((PSO(), DMD2()), (DMD2(), DMD2()), (PSO(), PSO()), (DMD2(), Alternating())):
        with pytest.raises(ValueError, match=f"got {type(reinforcement).__name__} and {type(distillation).__name__}"):
            Alternating(distillation=distillation, reinforcement=reinforcement)
    with pytest.raises(ValueError, match="Reconstruction trains the codec, and reinforcement the denoiser"):
        Alternating(distillation=Reconstruction())


@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_the_exact_optimum_of_offline_pairs(beta: float) -> None:
    """Three data of four are +a and one is -a, and the reference is 0: `log sigmoid` is best where `beta a x = log 3`."""
    student, reference = AffineTableStudent((1.0,)), AffineTableStudent((1.0,)).requires_grad_(False)
    data = torch.where(torch.arange(64) % 4 > 0, 0.5, -0.5).double().reshape(64, 1, 1, 1, 1)
    given = Batch(cond_of(1, 64), cond_of(0, 64), (1, 1, 1, 1), x0=data)
    method, made = PSO(rollout=ONE_STEP, beta=beta, temperature=1.0), Nets({"student": student, "reference": reference})
    minimise([student.offset], lambda: terms(method.student_loss(made, given, Rng(0)))["preference"])
    assert float(student.offset.detach()) == pytest.approx(math.log(3) / (0.5 * beta), abs=1e-6)


def test_a_plan_measures_both_turns() -> None:
    """One role is trained in two ways, and only the second needs the reference."""
    model, settings = tiny_model(), small(4, health=None)
    method = Alternating(
        distillation=DMD2(rollout=ONE_STEP, critic_updates=1),
        reinforcement=PSO(rollout=ONE_STEP, reward=MotionReward()),
        ratio=2,
    )
    card = stored_card(model)
    phases = Outline.of(card, method, settings, FRAMES).plan().phases
    assert [phase.roles for phase in phases] == [("critic",), ("student",), ("student",)]
    assert "critic" in phases[1].reads and "reference" not in phases[1].reads
    assert "reference" in phases[2].reads and "critic" not in phases[2].reads


@pytest.mark.parametrize(
    "method",
    [PSO(rollout=TWO), PSO(rollout=TWO, reward=Linear(), candidates=4), GRPO(rollout=TWO, reward=Linear())],
    ids=["offline", "PSO", "GRPO"],
)
def test_the_cost_is_that_of_the_calls_at_a_mean_exit(method: PSO | GRPO) -> None:
    """A candidate of the last step is the clip itself: nobody predicts it."""
    counted: dict[str, float] = {}
    for exit in (0, 1):
        rng = next(r for r in (Rng(0, step) for step in range(20)) if r.integer("exit", 2) == exit)
        student, other = Asked(Shifted()), Asked(Shifted())
        name = "reference" if isinstance(method, PSO) else "old"
        terms(method.student_loss(nets(student, name, other), batch(x0=noise("data")), rng))
        for role, network in (("student", student), (name, other)):
            counted[role] = counted.get(role, 0) + sum(3 if q.grad else 1 for q in network.questions) / 2
    assert {work.role: work.forwards for work in method.cost()} == counted


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """Counts iterations."""

    iterations: float = 1.0

    def lengthened(self, factor: float) -> Any:
        return replace(self, iterations=factor * self.iterations)


@dataclass(frozen=True, kw_only=True)
class Distilled(_Counted, DMD2):
    """Of a length of its own."""


@dataclass(frozen=True, kw_only=True)
class Reinforced(_Counted, PSO):
    """Of a length of its own."""


def test_both_turns_grow_with_the_run() -> None:
    longer = Alternating(distillation=Distilled(), reinforcement=Reinforced()).lengthened(2.0)
    assert (longer.distillation, longer.reinforcement) == (Distilled(iterations=2.0), Reinforced(iterations=2.0))


def test_turns_whose_roles_of_one_name_differ_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(PSO):
        def aux(self) -> dict[str, Role]:
            return {**super().aux(), "critic": Copy("student")}

    Alternating(reinforcement=PSO())
    with pytest.raises(ValueError, match="each have a critic of their own; choose other methods"):
        Alternating(reinforcement=Other())


def test_turns_have_the_rollouts_of_both() -> None:
    method = Alternating(distillation=DMD2(anchor=0.25), reinforcement=PSO())
    assert method.rollouts == (*method.distillation.rollouts, *method.reinforcement.rollouts)
