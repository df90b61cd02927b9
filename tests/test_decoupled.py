"""Decoupled guidance (2511.22677): the scores are compared at one time, and guidance is read at another, cleaner one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.core import Batch, Rng
from fewstep.diffusion import CFG, STG, from_x0
from fewstep.engine.prepare import prepare
from fewstep.methods import AVDM2, DMD2, TDM, BackwardSimulation, Matching, Nets
from fewstep.methods.matching import MATCHINGS, Noised, Point, ReverseKL, Scores
from fewstep.methods.rollouts import Rolled
from fewstep.methods.targets import FLOOR
from support_engine import Everything, small, tiny_model
from support_gaussian import RF, Asked, FreeClips, GaussianTeacher, cond_of, conds_of, f64, terms

NULL, MEAN, STD, SCALE = -0.2, 0.7, 0.6, 3.5
INPUT = 0.75
"""The student's input has this time: guidance is read below it."""
DECOUPLED = ReverseKL(weight="one", decoupled=True)
GUIDED = CFG(scale=SCALE)
LOW, HIGH = 0.02, 0.98
SHAPE = (1, 4, 6, 6)


def integral(t: float) -> float:
    """From 0 to t, of `t^2 / ((1 - t)^2 v + t^2)`, with v = STD^2."""
    v, a = STD**2, 1 + STD**2
    log = v / a * math.log((a * t * t - 2 * v * t + v) / v)
    arc = (2 * v * v / a - v) / STD * (math.atan((a * t - v) / STD) - math.atan(-STD))
    return (t + log + arc) / a


KAPPA = (integral(INPUT) / INPUT) / ((integral(HIGH) - integral(LOW)) / (HIGH - LOW))
"""Mean of `s^2 / V` at the times of guidance over that at the times of the scores."""


def gradient(mu: float, *, below: float = INPUT, eps: float = 0.0) -> float:
    """The expected gradient on clips `mu + STD z`, by quadrature over both times; the critic is exact."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))
    x0 = torch.full((len(nodes), 1, 1, 1, 1), mu + 0.3, dtype=torch.float64, requires_grad=True)
    t, u = LOW + (HIGH - LOW) * (nodes + 1) / 2, below * (nodes + 1) / 2
    noise = torch.full_like(x0, eps)
    noised = Noised(x0, RF.add_noise(x0, noise, t), t, noise, Point(RF.add_noise(x0.detach(), -noise, u), u))
    teacher, critic = GaussianTeacher(f64(NULL, MEAN), STD), GaussianTeacher(f64(0, mu), STD)
    both = Scores(teacher, critic, GUIDED, cond_of(1, len(nodes)), cond_of(0, len(nodes)))
    DECOUPLED.loss(noised, both, weights).backward()
    assert x0.grad is not None
    return float(x0.grad.sum())


def test_the_fixed_point_moves_by_the_ratio_of_the_two_mean_weights() -> None:
    """m_c + (w - 1) kappa (m_c - m_0), where plain guidance has kappa = 1."""
    low, high = gradient(0.0), gradient(1.0)
    found = -low / (high - low)  # the gradient is linear in the mean
    assert found == pytest.approx(MEAN + (SCALE - 1) * KAPPA * (MEAN - NULL), rel=1e-9)
    assert KAPPA < 0.95
    assert gradient(found) == pytest.approx(0, abs=1e-12)
    assert gradient(found, eps=1.7) == pytest.approx(0, abs=1e-12)  # whatever the noise


@pytest.mark.parametrize("below", [0.25, 1.0])
def test_less_noisy_guidance_moves_it_less(below: float) -> None:
    low, high = gradient(0.0, below=below), gradient(1.0, below=below)
    kappa = (integral(below) / below) / ((integral(HIGH) - integral(LOW)) / (HIGH - LOW))
    assert -low / (high - low) == pytest.approx(MEAN + (SCALE - 1) * kappa * (MEAN - NULL), rel=1e-9)


def test_at_the_same_point_it_is_plain_guidance() -> None:
    torch.manual_seed(0)
    x0, eps = (
        torch.randn(4, *SHAPE, dtype=torch.float64, requires_grad=True),
        torch.randn(4, *SHAPE, dtype=torch.float64),
    )
    t = f64(0.1, 0.4, 0.7, 0.95)
    x_t = RF.add_noise(x0, eps, t)
    networks = GaussianTeacher(f64(NULL, MEAN), STD), GaussianTeacher(f64(0.1, -0.4), 0.5)
    both = Scores(*networks, GUIDED, cond_of(1, 4), cond_of(0, 4))
    (plain,) = torch.autograd.grad(ReverseKL().loss(Noised(x0, x_t, t, eps), both), x0, retain_graph=True)
    (apart,) = torch.autograd.grad(
        ReverseKL(decoupled=True).loss(Noised(x0, x_t, t, eps, Point(x_t, t)), both), x0, retain_graph=True
    )
    torch.testing.assert_close(apart, plain)


def clips(name: str, size: int) -> Tensor:
    return Rng(3).randn((size, *SHAPE), name).double()


def nets(size: int, *more: str) -> Nets:
    roles = {
        "student": FreeClips((size, *SHAPE)), "teacher": GaussianTeacher(f64(NULL, MEAN), STD),
        **{role: GaussianTeacher(f64(0.1, -0.4), 0.5) for role in more},
    }  # fmt: skip
    return Nets({role: Asked(network.requires_grad_(role == "student")) for role, network in roles.items()})


def make_batch(size: int) -> Batch:
    return Batch(conds_of([1] * size), cond_of(0, size), SHAPE, x0=clips("real", size))


@pytest.mark.parametrize("method", [DMD2, TDM])
def test_methods_read_guidance_at_cleaner_clips_than_the_students_input(method: type) -> None:
    """And the scores at all times. The gradient is that of the two points together, over the distance to the guided teacher."""
    size = 64
    rollout = BackwardSimulation(grids=((1.0, INPUT),), exit="last", mode="ode")
    held = method(rollout=rollout, guidance=GUIDED, matching=ReverseKL(decoupled=True))
    networks = nets(size, "critic")
    terms(held.student_loss(networks, make_batch(size), Rng(0)))["matching"].backward()
    (scored,), (apart, alone) = networks.critic.questions, networks.teacher.questions
    assert alone.labels == [1] * size
    assert apart.labels == [1] * size + [0] * size
    u, x_u = apart.t[:size].double(), apart.x_t[:size]
    assert 0 < float(u.min()) < 0.1
    assert INPUT - 0.1 < float(u.max()) < INPUT
    assert float(scored.t.max()) > (0.9 if method is DMD2 else 0.6)
    assert not torch.allclose(x_u, scored.x_t)
    made = networks.student.net.clips
    noise = (x_u - (1 - u.reshape(-1, 1, 1, 1, 1)) * made.detach()) / u.reshape(-1, 1, 1, 1, 1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    teacher, (cond, none) = networks.teacher.net, (cond_of(c, size) for c in (1, 0))
    added = (SCALE - 1) * (teacher(x_u, u, cond).x0 - teacher(x_u, u, none).x0)
    real = teacher(scored.x_t, scored.t, cond).x0 + added
    fake = networks.critic.net(scored.x_t, scored.t, cond).x0
    weight = 1 / ((made.detach() - real).abs().flatten(1).mean(1) + FLOOR)
    torch.testing.assert_close(made.grad, weight.reshape(-1, 1, 1, 1, 1) * (fake - real) / made.numel())


def test_avdm2_reads_guidance_of_single_frames_below_the_time_of_their_clip() -> None:
    size = 32
    rollout = BackwardSimulation(grids=((1.0, INPUT),), exit="last")
    method = AVDM2(rollout=rollout, adversary=None, frames=3, guidance=GUIDED, matching=ReverseKL(decoupled=True))
    networks = nets(size, "image_critic")
    terms(method.student_loss(networks, make_batch(size), Rng(0)))["matching"].backward()
    apart, alone = networks.teacher.questions
    assert apart.x_t.shape == (6 * size, 1, 1, 6, 6)
    assert 0.6 < float(apart.t.max()) < INPUT
    torch.testing.assert_close(alone.x_t, networks.image_critic.questions[0].x_t)


def test_frames_with_times_of_their_own_are_all_noisier() -> None:
    below = torch.linspace(0.2, 0.9, 8, dtype=torch.float64).repeat(16, 1)
    zero = torch.zeros(16, dtype=torch.float64)
    point = DECOUPLED.guided_at(clips("x", 16), RF, zero, below, Rng(0))
    assert point is not None
    assert point.t.shape == (16,)
    assert float(point.t.max()) < 0.2


def test_a_state_with_noise_is_only_noised_further() -> None:
    """From time s on, to its marginal there."""
    s, below = torch.full((64,), 0.5, dtype=torch.float64), torch.full((64,), 0.75, dtype=torch.float64)
    x_s = clips("x", 64)
    point = DECOUPLED.guided_at(x_s, RF, s, below, Rng(0))
    assert point is not None
    assert float(point.t.min()) > 0.5
    assert float(point.t.max()) < 0.75
    a, b = RF.between(s, point.t, x_s)
    assert float(((point.x_t - a * x_s) / b).std()) == pytest.approx(1, abs=0.05)


def test_it_costs_one_more_call_of_the_teacher() -> None:
    for method in (DMD2(), TDM(), AVDM2(adversary=None)):
        apart = replace(method, matching=ReverseKL(decoupled=True))
        real = [sum(w.forwards for w in m.cost() if w.role == "teacher") for m in (method, apart)]
        assert real == [2, 3]


@pytest.mark.parametrize("matching", [m() for m in MATCHINGS if m is not ReverseKL] + [ReverseKL()])
def test_other_matchings_read_guidance_where_they_read_the_scores(matching: Matching) -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert matching.guided_at(clips("x", 2), RF, zero, zero + 1, Rng(0)) is None
    assert matching.teacher_calls(GUIDED) == (4 if matching.through else 2)


@pytest.mark.parametrize("method", [DMD2(critic_updates=1), AVDM2(critic_updates=1, frames=2)])
def test_a_run_trains_with_it(method: DMD2 | AVDM2, tmp_path: Path) -> None:
    held = replace(method, matching=ReverseKL(decoupled=True))
    run = prepare(tiny_model(), held, Everything(), small(1, health=None), tmp_path)
    run.iterate()
    assert math.isfinite(run.figures["loss/matching"])
    assert run.figures["grad/student"] > 0


def test_what_has_no_effect_or_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="weight exact is that of one time"):
        ReverseKL(weight="exact", decoupled=True)
    for method in (DMD2, TDM, AVDM2):
        for guidance in (CFG(), STG(scale=3.0), STG(scale=1.0)):
            with pytest.raises(ValueError, match=r"a scale other than 1; got .*; set guidance\.scale"):
                method(guidance=guidance, matching=ReverseKL(decoupled=True))
    with pytest.raises(ValueError, match="single frames are shown"):
        AVDM2(matching=ReverseKL(motion=0.2))
    zero, x = torch.zeros(1), torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="give Noised what `guided_at` makes"):
        DECOUPLED.loss(Noised(x, x, zero, x), Scores(*(None,) * 2, GUIDED, *(None,) * 2))  # type: ignore[arg-type]


def test_along_a_trajectory_guidance_is_read_above_where_the_step_lands() -> None:
    """At the landing with noise of its own, between its time and that of the step's input."""

    method = TDM(guidance=GUIDED, matching=ReverseKL(decoupled=True))
    x0, x_t, t = clips("made", 64), clips("state", 64), torch.full((64,), 0.75, dtype=torch.float64)
    grid = (1.0, 0.75, 0.5, 0.25)
    noised, s = method.noised(Rolled(x0, x_t, t, exit=1, grid=grid), RF, Rng(0))
    apart = noised.guided_at
    assert apart is not None and float(apart.t.min()) > 0.5 and float(apart.t.max()) < 0.75
    a, b = RF.between(s, apart.t, x0)
    eps = (apart.x_t - a * from_x0(x0, x_t, t, RF).step_to(s)) / b
    assert abs(float(eps.mean())) < 0.05 and float(eps.std()) == pytest.approx(1, abs=0.05)
