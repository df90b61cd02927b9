"""Distribution matching along the trajectory: TDM, whose critic needs an unbiased target, and moment matching."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.core import Batch, Rng
from fewstep.core.shipped import shipped
from fewstep.diffusion import CFG, VP, NoisePath, Prediction, from_x0
from fewstep.leaderboard.stages import stages_of
from fewstep.methods import TDM, BackwardSimulation, MomentMatching, Nets, targets
from fewstep.methods.distribution.tdm import unbiased
from fewstep.methods.matching import FDivergence, Fisher, Noised, ReverseKL, ScoreImplicit
from fewstep.methods.progressive import landing
from fewstep.methods.rollouts import Rolled
from fewstep.methods.rollouts.grids import exact, stops
from fewstep.pipeline import read
from support_gaussian import RF, SCALAR, Asked, FreeClips, GaussianTeacher, cond_of, conds_of, f64, minimise, terms

B, SHAPE, LABELS = 4, (1, 4, 8, 8), [1, 2, 1, 1]
MEANS, STD, OTHER = f64(-0.2, 0.7, 1.5), 0.4, f64(0.3, -0.6, 0.1)
GRID = (1.0, 0.75, 0.5, 0.25)
METHOD = TDM(rollout=BackwardSimulation(grids=(GRID,), mode="ode"), guidance=CFG(scale=2.5))


def clips(name: str, size: int = B) -> Tensor:
    return Rng(3).randn((size, *SHAPE), name).double()


def make_batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=clips("real"))


def nets() -> Nets:
    networks = {
        "student": FreeClips((B, *SHAPE)), "teacher": GaussianTeacher(MEANS, STD), "critic": GaussianTeacher(OTHER, 0.5)
    }  # fmt: skip
    return Nets({role: Asked(network.requires_grad_(role == "student")) for role, network in networks.items()})


@pytest.mark.parametrize("path", [RF, VP()])
def test_noise_from_a_time_on_makes_the_marginal_of_a_later_time(path: NoisePath) -> None:
    s, t, like = f64(0.3, 0.6), f64(0.5, 0.9), torch.zeros(2, 1, 1, 1, 1, dtype=torch.float64)
    a, b = path.between(s, t, like)
    first, last = path.at(s, like), path.at(t, like)
    torch.testing.assert_close(a * first.a, last.a)
    torch.testing.assert_close((a * first.s).square() + b.square(), last.s.square())
    a, b = path.between(torch.zeros_like(t), t, like)
    torch.testing.assert_close((a, b), (last.a / path.at(0 * t, like).a, b))


@pytest.mark.parametrize("path", [RF, VP()])
def test_the_critics_target_is_unbiased_and_the_obvious_one_is_not(path: NoisePath) -> None:
    """A linear regression on the noised state finds the exact denoiser, which knows nothing of x_s."""
    s, t, mean, std = 0.4, 0.8, 0.7, 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    z, noise, eps = (torch.from_numpy(v.flatten()).reshape(-1, 1, 1, 1, 1) for v in np.meshgrid(nodes, nodes, nodes))
    w = torch.from_numpy(np.einsum("i,j,k->ijk", weights, weights, weights).flatten())
    x0, times = mean + std * z, torch.full((len(z),), t, dtype=torch.float64)
    lower = torch.full_like(times, s)
    x_s = path.add_noise(x0, noise, lower)
    a, b = path.between(lower, times, x_s)
    noised = Noised(x_s, a * x_s + b * eps, times, eps)
    found, _, _ = unbiased(noised, lower, path)
    exact = GaussianTeacher(f64(0, mean), std, path)(noised.x_t, times, cond_of(1, len(z))).x0
    torch.testing.assert_close(fitted(noised.x_t, found, w), exact)
    torch.testing.assert_close(fitted(noised.x_t, x0, w), exact)  # what the target stands for
    assert float((fitted(noised.x_t, x_s, w) - exact).abs().max()) > 0.05


def fitted(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Weighted least squares of y on 1 and x, at x."""
    rows = torch.stack([torch.ones_like(x), x], -1).reshape(-1, 2)
    root = w.sqrt()[:, None]
    solution = torch.linalg.lstsq(rows * root, y.reshape(-1, 1) * root).solution
    return (rows @ solution).reshape_as(x)


def test_the_target_is_eq_8_of_phased_dmd_and_from_zero_it_is_flow_matching() -> None:
    s, t = f64(0.25, 0.0), f64(0.7, 0.6)
    x_s, eps = clips("x", 2), clips("e", 2)
    a, b = RF.between(s, t, x_s)
    noised = Noised(x_s, a * x_s + b * eps, t, eps)
    x0, noise, weight = unbiased(noised, s, RF)
    (a_s, s_s, *_), (a_t, s_t, *_) = RF.at(s, x_s), RF.at(t, x_s)
    wanted = (a_s.square() * s_t + a_t * s_s.square()) / (a_s.square() * b) * eps - x_s / a_s
    torch.testing.assert_close(noise - x0, wanted)
    torch.testing.assert_close(x0[1], x_s[1])
    torch.testing.assert_close(noise[1], eps[1])
    torch.testing.assert_close(weight, (10 * b.square()).clamp_max(1).flatten())


@pytest.mark.parametrize("interval", ["step", "above"])
@pytest.mark.parametrize("stop", range(4))
def test_states_of_a_step_are_compared_within_it(interval: str, stop: int) -> None:
    """The landing of a step with noise, at times between the landing and where the step began (or all above)."""
    method = replace(METHOD, interval=interval)
    t, landed = GRID[stop], (*GRID, 0.0)[stop + 1]
    x0, x_t = clips("made", 64), clips("state", 64)
    rolled = Rolled(x0, x_t, torch.full((64,), t, dtype=torch.float64), exit=stop, grid=GRID)
    noised, s = method.noised(rolled, RF, Rng(0))
    assert torch.equal(s, torch.full_like(s, landed))
    top = t if interval == "step" else 1.0
    assert float(noised.t.min()) > landed
    assert float(noised.t.max()) <= max(min(top, 0.98), landed)
    x_s = from_x0(x0, x_t, rolled.t, RF).step_to(s)
    a, b = RF.between(s, noised.t, x_s)
    torch.testing.assert_close(noised.x_t, a * x_s + b * noised.eps)
    assert noised.x0 is x0


def test_the_students_gradient_is_on_its_clean_prediction() -> None:
    networks, batch = nets(), make_batch()
    terms(METHOD.student_loss(networks, batch, Rng(0)))["matching"].backward()
    (seen,), made = networks.critic.questions, networks.student.net.clips
    teacher, cond = networks.teacher.net, conds_of(LABELS)
    plain, free = (teacher(seen.x_t, seen.t, c).x0 for c in (cond, cond_of(0, B)))
    real, fake = free + 2.5 * (plain - free), networks.critic.net(seen.x_t, seen.t, cond).x0
    weight = 1 / ((made.detach() - real).abs().flatten(1).mean(1) + targets.FLOOR)
    torch.testing.assert_close(made.grad, weight.reshape(-1, 1, 1, 1, 1) * (fake - real) / made.numel())


def test_the_critic_learns_without_gradient_in_the_student() -> None:
    networks = nets()
    networks.critic.requires_grad_(True)
    terms(METHOD.critic_loss(0, networks, make_batch(), Rng(0)))["denoising"].backward()
    assert networks.student.net.clips.grad is None
    assert networks.critic.net.means.grad is not None
    assert not any(question.grad for question in networks.student.questions)


MEAN, OFF = 0.7, 0.8


class Walk(nn.Module):
    """A student whose every step lands on the teacher's marginal, as its ODE does; at the time `off` by OFF in clean latents."""

    def __init__(self, off: float | None) -> None:
        super().__init__()
        self.off, self.path, self.teacher = off, RF, GaussianTeacher(f64(0, MEAN), STD).requires_grad_(False)
        self.push = nn.Parameter(f64(0.0))

    def forward(self, x_t: Tensor, t: Tensor, *rest: object) -> Prediction:
        times, extra = (*GRID, 0.0), lambda u: (1 - u) * OFF if u == self.off else 0.0
        here = float(t[0])
        there = times[times.index(here) + 1]
        x_s = self.teacher.flow_map(x_t - extra(here), here, there, MEAN) + extra(there)
        x0 = landing(x_t, t, x_s, torch.full_like(t, there), RF)
        return Prediction(x0 + self.push, "x0", x_t, t, RF)


class ByInterval(nn.Module):
    """A critic with a mean of its own between every two times of the grid, and one deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.net = RF, GaussianTeacher(torch.zeros(4), 0.0)
        self.net.std = nn.Parameter(f64(0.6))

    def forward(self, x_t: Tensor, t: Tensor, *rest: object) -> Prediction:
        interval = (t.double()[:, None] <= f64(*GRID[1:])).sum(1)
        return self.net(x_t, t, conds_of(interval.tolist()))


@pytest.mark.parametrize("off", [None, 0.5, 0.0])
def test_where_every_step_lands_right_nothing_moves_and_a_wrong_step_moves_alone(off: float | None) -> None:
    """The critic learns each interval from the landings; the student is moved where the step of that interval lands off."""
    method = replace(METHOD, guidance=CFG(), high=0.9, low=0.2, matching=ReverseKL(weight="one"))
    size, seeds = 4000, range(12)
    batch = Batch(cond_of(1, size), cond_of(0, size), SCALAR)
    student, critic = Walk(off), ByInterval()
    networks = Nets({"student": student, "critic": critic, "teacher": student.teacher})
    losses = lambda: [terms(method.critic_loss(0, networks, batch, Rng(0, n)))["denoising"] for n in seeds]  # noqa: E731
    minimise(list(critic.parameters()), lambda: torch.stack(losses()).sum())
    wanted = [MEAN + OFF * (landed == off) for landed in (0.75, 0.5, 0.25, 0.0)]
    assert critic.net.means.tolist() == pytest.approx(wanted, abs=0.1)
    assert critic.net.std.item() == pytest.approx(STD, abs=0.05)
    moved = dict[float, float]()
    for n in seeds:
        (slope,) = torch.autograd.grad(terms(method.student_loss(networks, batch, Rng(0, n)))["matching"], student.push)
        rolled = method.rollout(student, batch, Rng(0, n).fold("student"), grad=False)
        moved[method.rollout.landing(rolled)] = float(slope)
    assert moved.keys() == {0.75, 0.5, 0.25, 0.0}
    for landed, slope in moved.items():
        assert slope > 0.1 if landed == off else abs(slope) < 0.08, landed


def test_the_critics_weight_falls_where_its_target_grows() -> None:
    """`min(1, 10 b^2)`, b the noise from s to u: on a straight path `b^2 = u^2 - ((1 - u) s / (1 - s))^2`."""
    s, u = f64(0.5, 0.5, 0.0), f64(0.51, 0.9, 0.2)
    x = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64)
    b2 = u.square() - ((1 - u) * s / (1 - s)).square()
    torch.testing.assert_close(unbiased(Noised(x, x, u, x), s, RF)[2], (10 * b2).clamp_max(1))
    assert 10 * b2[0] < 1 < 10 * b2[1]


def test_times_next_to_the_landing_are_left_out() -> None:
    rolled = METHOD.rollout(nets().student, make_batch(), Rng(0), grad=False)
    for low in (0.02, 0.9):
        noised, s = replace(METHOD, low=low).noised(rolled, RF, Rng(0))
        share = (noised.t - s) / (rolled.t.clamp_max(METHOD.high) - s)
        assert low <= float(share.min()) and float(share.max()) <= 1


@pytest.mark.parametrize("method", [replace(METHOD, critic_updates=2), MomentMatching(critic_updates=2)])
def test_every_turn_has_noise_of_its_own(method: TDM | MomentMatching) -> None:
    networks = nets()
    for update in method.updates(0):
        terms(update.losses(networks, make_batch(), Rng(0)))
    seen = [question.x_t for question in networks.critic.questions]
    assert len(seen) == 3 and not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_tdm_says_what_it_costs_and_refuses_fresh_noise() -> None:
    assert sum(work.forwards for work in METHOD.cost()) == 2.5 + 4.5 + 2 + 4
    with pytest.raises(ValueError, match="rollout.mode to ode"):
        TDM(rollout=BackwardSimulation())
    with pytest.raises(ValueError, match="TDM has none"):
        TDM(matching=FDivergence())


def test_a_matching_that_needs_the_students_own_clips_noised_is_refused() -> None:
    """SiD and SIM compare the critic with the student's clip, whose mean given x_u it does not predict where s > 0."""
    for matching in (Fisher(), ScoreImplicit(), ReverseKL(weight="exact")):
        with pytest.raises(ValueError, match="weight distance or one"):
            TDM(matching=matching)


def test_times_must_be_left_above_every_landing() -> None:
    shifted = BackwardSimulation(grids=(GRID,), mode="ode", shift=5.0)
    with pytest.raises(ValueError, match=r"lands at 0\.9375, and high: 0\.9 leaves no time"):
        TDM(rollout=shifted, high=0.9)
    TDM(rollout=replace(shifted, exit="last"), high=0.1)
    TDM(
        rollout=replace(shifted, phase=(0.5, 1.0)), high=0.9
    )  # both steps are compared above 0.8333, where the phase ends
    with pytest.raises(ValueError, match=r"lands at 0\.8333"):
        TDM(rollout=replace(shifted, phase=(0.5, 1.0)), high=0.8)


RECIPES = [
    (name, stage.method)
    for name, path in shipped().items() if "type: TDM" in path.read_text()
    for stage in stages_of(read(path, [])) if isinstance(stage.method, TDM)
]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), RECIPES, ids=[name for name, _ in RECIPES])
def test_the_critics_target_is_finite_at_every_step_of_every_recipe(name: str, method: TDM) -> None:
    assert len({name for name, _ in RECIPES}) >= 5
    x0, x_t = clips("made", 64), clips("state", 64)
    rollout = method.rollout
    for grid, found in zip(exact(rollout.grids, rollout.shift), stops(rollout.grids, rollout.exit, rollout.span)):
        for stop in found:
            t = torch.full((64,), grid[stop], dtype=torch.float64)
            noised, s = method.noised(Rolled(x0, x_t, t, exit=stop, grid=grid), RF, Rng(0, stop))
            assert (noised.t > s).all()
            assert all(x.isfinite().all() for x in unbiased(noised, s, RF))


# --- moment matching --------------------------------------------------------------------------------------------------

MOMENTS = MomentMatching(steps=(4,), guidance=CFG(scale=2.5))


def test_the_step_lands_within_one_step_of_the_grid() -> None:
    networks, batch = nets(), make_batch()
    x, x_s, s = replace(MOMENTS, shift=3.0).stepped(networks, batch, Rng(0))
    (seen,) = networks.student.questions
    torch.testing.assert_close(x, networks.student.net.clips)
    assert not x_s.requires_grad
    back = lambda t: t / (3 - 2 * t)  # noqa: E731 - the shift undone
    lengths = back(seen.t.double()) - back(s.double())
    assert (lengths >= -1e-9).all()
    assert (lengths <= 0.25 + 1e-9).all()
    torch.testing.assert_close(x_s, from_x0(x.detach(), seen.x_t, seen.t, RF).step_to(s))


def test_a_step_never_goes_back_in_time() -> None:
    student = FreeClips((4096, *SCALAR))
    networks, x0 = Nets({"student": Asked(student)}), torch.zeros(4096, *SCALAR, dtype=torch.float64)
    batch = Batch(cond_of(1, 4096), cond_of(0, 4096), SCALAR, x0=x0)
    *_, s = replace(MOMENTS, steps=(1, 4)).stepped(networks, batch, Rng(0))
    (seen,) = networks.student.questions
    assert float(seen.t.min()) < 1e-3, "the draw reaches the times that matter"
    assert (s <= seen.t).all()


def test_the_best_critic_is_the_middle_of_student_and_teacher() -> None:
    networks, batch = nets(), make_batch()
    middle = FreeClips((B, *SHAPE))
    networks = Nets({**networks, "critic": middle})
    minimise(list(middle.parameters()), lambda: terms(MOMENTS.critic_loss(0, networks, batch, Rng(0)))["moments"])
    seen, made = networks.teacher.questions[-1], networks.student.net.clips.detach()
    plain, free = (networks.teacher.net(seen.x_t[:B], seen.t[:B], c).x0 for c in (conds_of(LABELS), cond_of(0, B)))
    torch.testing.assert_close(middle.clips.detach(), (made + free + 2.5 * (plain - free)) / 2, atol=1e-6, rtol=1e-6)


def test_a_sample_of_the_clean_clips_is_left_where_it_is_and_their_mean_is_not() -> None:
    """Moments of the error, `E[(x - teacher(x_s)) x_s^n]`, with x a sample of the posterior at t, and with its mean."""
    t, s, mean, std = 0.8, 0.6, 0.7, 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    z, eps = (torch.from_numpy(v.flatten()).reshape(-1, 1, 1, 1, 1) for v in np.meshgrid(nodes, nodes))
    w = torch.from_numpy(np.outer(weights, weights).flatten())
    teacher, x0 = GaussianTeacher(f64(0, mean), std), mean + std * z
    times, lower = (torch.full((len(z),), v, dtype=torch.float64) for v in (t, s))
    x_t, cond = RF.add_noise(x0, eps, times), cond_of(1, len(z))
    sizes = []
    for x in (x0, teacher(x_t, times, cond).x0.detach()):
        x_s = from_x0(x, x_t, times, RF).step_to(lower)
        error = x - teacher(x_s, lower, cond).x0.detach()
        sizes.append(max(abs(float((w * (error * x_s**n).flatten()).sum() / w.sum())) for n in range(3)))
    assert sizes[0] < 1e-10
    assert sizes[1] > 1e-3


def test_the_student_follows_the_difference_of_critic_and_teacher() -> None:
    networks, batch = nets(), make_batch()
    terms(MOMENTS.student_loss(networks, batch, Rng(0)))["matching"].backward()
    (seen,), made = networks.critic.questions, networks.student.net.clips
    plain, free = (networks.teacher.net(seen.x_t, seen.t, c).x0 for c in (conds_of(LABELS), cond_of(0, B)))
    real, fake = free + 2.5 * (plain - free), networks.critic.net(seen.x_t, seen.t, conds_of(LABELS)).x0
    weight = 1 / ((made.detach() - real).abs().flatten(1).mean(1) + targets.FLOOR)
    torch.testing.assert_close(made.grad, weight.reshape(-1, 1, 1, 1, 1) * (fake - real) / made.numel())


def test_moment_matching_serves_its_steps_and_refuses_none() -> None:
    contract = MomentMatching(steps=(1, 2, 4), shift=3.0).contract(nets_contract())
    assert contract.counts == (1, 2, 4)
    assert contract.times(2) == (1.0, 0.75, 0.0)
    assert sum(work.forwards for work in MOMENTS.cost()) == 4 + 4 + 4
    with pytest.raises(ValueError, match="steps is empty"):
        MomentMatching(steps=())


def nets_contract() -> object:
    from fewstep.diffusion import Contract

    return Contract()


def made_calls(networks: Nets, role: str, size: int = B) -> float:
    """Forward-equivalents on a clip: a call with gradient of a network that is trained counts three."""
    return sum(len(q.x_t) / size * (3 if q.grad else 1) for q in networks[role].questions)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize(
    "method",
    [TDM(rollout=BackwardSimulation(grids=(GRID,), exit="last", mode="ode")), MomentMatching(steps=(4,))],
    ids=["TDM", "MomentMatching"],
)
def test_the_cost_is_that_of_the_calls_that_are_made(method: TDM | MomentMatching, turns: int) -> None:
    networks, method = nets(), replace(method, critic_updates=turns)
    for update in method.updates(0):
        terms(update.losses(networks, make_batch(), Rng(0)))
    assert {work.role: work.forwards for work in method.cost()} == {
        role: made_calls(networks, role) for role in ("student", "teacher", "critic")
    }


def test_every_sample_belongs_to_one_of_the_step_counts_and_steps_have_all_lengths() -> None:
    student, size = FreeClips((4096, *SCALAR)), 4096
    networks, x0 = Nets({"student": Asked(student)}), torch.zeros(size, *SCALAR, dtype=torch.float64)
    batch = Batch(cond_of(1, size), cond_of(0, size), SCALAR, x0=x0)
    *_, s = replace(MOMENTS, steps=(4, 1)).stepped(networks, batch, Rng(0))
    (seen,) = networks.student.questions
    length = (seen.t - s)[seen.t > 0.9].double()
    assert float((length > 0.25).double().mean()) == pytest.approx(0.5 * 0.75, abs=0.08), "half of them take steps of 1"
    assert float((length < 0.125).double().mean()) == pytest.approx(0.5 * (0.125 + 0.5), abs=0.08), "and half of 1/4"
