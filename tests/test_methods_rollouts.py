"""The training simulation is the sampler, stopped early, with one call that carries gradient."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch

from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import CFG, DDIM, EDM, Contract, Renoise, Shifted, uniform_grid
from fewstep.methods import DMD2, BackwardSimulation, FromData, FromPairs, Rollout
from fewstep.methods.rollouts import NESTED, pick, predict, student_contract
from support_engine import tiny_model
from support_gaussian import (
    ONE_STEP,
    SCALAR,
    AffineTableStudent,
    Counting,
    GaussianTeacher,
    f64,
    make_batch,
    normal,
    stored_pairs,
)

FOUR = (1.0, 0.75, 0.5, 0.25)
TEACHER = Contract(grid=Shifted(shift=3.0), guidance=CFG(scale=4.0))


def student() -> Counting:
    return Counting(AffineTableStudent(FOUR).fill([(0.1, 0.2), (0.3, 0.1), (0.5, 0.0), (0.9, 0.1)]))


def test_exactly_one_call_carries_gradient_and_nothing_runs_after_the_exit() -> None:
    exits = set()
    for step in range(30):
        net = student()
        rolled = BackwardSimulation(grids=NESTED)(net, make_batch(2), Rng(0, step), grad=True)
        enabled = [grad for grad, _, _ in net.calls]
        assert enabled == [False] * (len(enabled) - 1) + [True]
        assert rolled.x0.requires_grad
        assert torch.equal(rolled.x_t, net.calls[-1][1])
        assert torch.equal(rolled.t, net.calls[-1][2])
        exits.add(len(enabled))
    assert exits == {1, 2, 3, 4}


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("grad_calls", [1, 2, 3, 9])
def test_the_last_calls_carry_gradient_through_what_is_between_them(
    mode: Literal["sde", "ode"], grad_calls: int
) -> None:
    table = AffineTableStudent(FOUR).fill([(0.1, 0.2), (0.3, 0.1), (0.5, 0.0), (0.9, 0.1)])
    net = Counting(table)
    rolled = BackwardSimulation(exit="last", mode=mode, grad_calls=grad_calls)(net, make_batch(2), Rng(0), grad=True)
    graded = min(grad_calls, 4)
    assert [grad for grad, _, _ in net.calls] == [False] * (4 - graded) + [True] * graded
    (slopes,) = torch.autograd.grad(rolled.x0.sum(), [table.offset])  # one entry per time
    assert [bool(slope) for slope in slopes] == [False] * (4 - graded) + [True] * graded
    assert [visit.x0.requires_grad for visit in rolled.before] == [False] * (4 - graded) + [True] * (graded - 1)


def test_a_rollout_tells_what_led_to_its_last_call() -> None:
    batch, rng = make_batch(2), Rng(5, 2)
    for exits in range(4):
        net, at = student(), next(Rng(5, k) for k in range(99) if Rng(5, k).integer("exit", 4) == exits)
        rolled = BackwardSimulation()(net, batch, at, grad=True)
        assert rolled.exit == exits == len(rolled.before) and rolled.grid == FOUR
        assert rolled.noise is not None and torch.equal(rolled.noise, at.randn(batch.noise_shape, "noise"))
        visits = (*rolled.before, rolled)
        for visit, (_, x_t, t) in zip(visits, net.calls, strict=True):
            assert torch.equal(visit.x_t, x_t) and torch.equal(visit.t, t)
            assert torch.equal(visit.x0, net.net(x_t, t, batch.cond).x0)
    x0 = normal(2)
    noised = FromData()(student(), make_batch(2, x0=x0), rng, grad=True)
    assert noised.before == () and noised.noise is not None and torch.equal(noised.noise, rng.randn(x0.shape, "noise"))


def test_calls_with_gradient_cost_their_way_back() -> None:
    assert BackwardSimulation().work == 2.5 + 2
    assert BackwardSimulation(exit="last", grad_calls=3).work == 4 + 2 * 3
    assert BackwardSimulation(grids=((1.0,), (1.0, 0.5)), grad_calls=2).work == pytest.approx(1.25 + 2 * (1 + 1.5) / 2)
    with pytest.raises(ValueError, match="grad_calls must be at least 1, got 0"):
        BackwardSimulation(grad_calls=0)


def test_times_of_frames_are_picked_and_predicted_at() -> None:
    index = torch.tensor([[0, 1, 2], [3, 3, 0]])
    t = pick(FOUR, index, torch.zeros(()))
    assert t.dtype == torch.float32 and t.tolist() == [[FOUR[i] for i in row] for row in index.tolist()]
    network, x = tiny_model().denoiser, Rng(0).randn((2, 4, 3, 8, 8), "x")
    cond = Cond(torch.zeros(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    batch = Batch(cond, cond, (4, 3, 8, 8))
    rolled = predict(network, x, t, batch, grad=True)
    assert torch.equal(rolled.t, t) and torch.equal(rolled.x0, network(x, t, batch.cond).x0)


@pytest.mark.parametrize("rollout", [BackwardSimulation(), FromData()], ids=lambda rollout: type(rollout).__name__)
def test_without_grad_no_call_carries_gradient(rollout: Rollout) -> None:
    net = student()
    assert not rollout(net, make_batch(2, x0=normal(2)), Rng(0), grad=False).x0.requires_grad
    assert not any(grad for grad, _, _ in net.calls)


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_the_last_exit_is_the_sampler_of_the_contract_bit_for_bit(mode: str) -> None:
    net, batch, rng = student(), make_batch(3), Rng(5, 2)
    rollout = BackwardSimulation(mode=mode, exit="last")
    contract = rollout.contract(TEACHER)
    noise = rng.randn(batch.noise_shape, "noise")
    made = contract.sampler(lambda x, t, call: net(x, t, batch.cond, call), noise, contract.times(), rng=rng)
    assert torch.equal(rollout(net, batch, rng, grad=True).x0, made)


def test_the_exit_is_the_same_on_every_place_but_the_noise_is_not() -> None:
    batch = make_batch(2)
    for step in range(10):
        a, b = (BackwardSimulation()(student(), batch, Rng(0, step, place), grad=False) for place in (0, 1))
        assert torch.equal(a.t, b.t)
        assert not torch.equal(a.x_t, b.x_t)


def test_inputs_between_steps_are_renoised_predictions() -> None:
    net = Counting(AffineTableStudent(FOUR).fill([(0.0, 0.6)] * 4))
    rng = Rng(1)
    BackwardSimulation(exit="last")(net, make_batch(2), rng, grad=True)
    assert torch.equal(net.calls[0][1], rng.randn((2, *SCALAR), "noise"))
    for i, t in enumerate(FOUR[1:]):
        expected = (1 - t) * 0.6 + t * rng.randn((2, *SCALAR), f"renoise/{i}").double()
        torch.testing.assert_close(net.calls[i + 1][1], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rollout", [ONE_STEP, BackwardSimulation()], ids=lambda r: type(r).__name__)
def test_an_exploding_path_starts_at_its_own_noise_level(rollout: Rollout) -> None:
    net = Counting(AffineTableStudent((1.0,), EDM()))
    rollout(net, make_batch(500), Rng(0), grad=False)
    assert 70 < float(net.calls[0][1].std()) < 90


def test_contracts_list_exact_shifted_grids_without_guidance() -> None:
    contract = BackwardSimulation(grids=NESTED, shift=5.0).contract(TEACHER)
    assert contract.trained == {n: uniform_grid(n, 5.0) for n in (1, 2, 4)}
    assert (contract.sampler, contract.steps, contract.guidance) == (Renoise(), 4, CFG())
    assert DMD2(rollout=BackwardSimulation(grids=NESTED, shift=5.0)).contract(TEACHER) == contract
    assert BackwardSimulation(mode="ode").contract(TEACHER).sampler == DDIM()
    assert ONE_STEP.contract(TEACHER).trained == {1: (1.0, 0.0)}


def test_a_grid_that_is_drawn_twice_as_often_is_one_grid_of_the_contract() -> None:
    once, twice = (BackwardSimulation(grids=grids, shift=5.0) for grids in (NESTED, (*NESTED, NESTED[-1])))
    assert once.contract(TEACHER) == twice.contract(TEACHER)
    with pytest.raises(
        ValueError, match="one list of times for each number of steps"
    ):  # which of them would be sampled?
        BackwardSimulation(grids=(*NESTED, (1.0, 0.8, 0.6, 0.4)))


def test_guidance_that_was_not_distilled_is_kept() -> None:
    """One of two experts was trained: the other is guided as before, and costs as much."""
    left = CFG(low=0.9, outside=3.0)
    contract = student_contract(TEACHER, ((1.0, 0.5),), 3.0, DDIM(), left)
    assert contract.guidance == left and contract.calls() == 4
    assert student_contract(TEACHER, ((1.0, 0.5),), 3.0, DDIM()).calls() == 2
    assert contract.times(3, force=True) == uniform_grid(3, 3.0)


def test_expected_calls() -> None:
    assert BackwardSimulation().calls == 2.5
    assert BackwardSimulation(exit="last").calls == 4
    assert BackwardSimulation(grids=NESTED).calls == pytest.approx((1 + 1.5 + 2.5) / 3)


@pytest.mark.parametrize("grid", [(0.9, 0.5), (999.0, 749.0, 499.0), (1.0, 0.5, 0.0), (1.0, 0.5, 0.5), (1.0, -0.5)])
def test_a_grid_that_is_none_is_refused_as_it_was_written(grid: tuple[float, ...]) -> None:
    """With what a grid is, and with the numbers of the recipe, not with shifted ones."""
    words = rf"decreases strictly from 1.0 .*without the final 0.*timestep / 1000.*got {re.escape(str(list(grid)))}$"
    for shift in (1.0, 3.0):
        with pytest.raises(ValueError, match=words):
            BackwardSimulation(grids=(grid,), shift=shift)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_from_data_noises_the_clip_at_grid_times(shift: float) -> None:
    net, x0 = student(), normal(64)
    rolled = FromData(shift=shift)(net, make_batch(64, x0=x0), Rng(3), grad=True)
    assert sorted(set(rolled.t.tolist()), reverse=True) == pytest.approx(uniform_grid(4, shift)[:-1])
    t = rolled.t.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(rolled.x_t, (1 - t) * x0 + t * Rng(3).randn(x0.shape, "noise"))


def test_from_pairs_reads_stored_states_and_refuses_unstored_times() -> None:
    pairs = stored_pairs(GaussianTeacher(f64(0.0, 0.7), 0.4), normal(64), 8)
    batch = make_batch(64, pairs=pairs)
    rolled = FromPairs()(student(), batch, Rng(3), grad=True)
    for row, t in enumerate(rolled.t.tolist()):
        assert torch.equal(rolled.x_t[row], pairs.states[row, pairs.times.index(t)])
    with pytest.raises(ValueError, match=r"time 0\.333\S* was not stored"):
        FromPairs(grids=((1.0, 1 / 3),))(student(), batch, Rng(3), grad=True)
