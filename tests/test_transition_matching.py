"""Transition matching: each line of its box, with heads whose answers are known; and both stages on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.compress import FlowHead
from fewstep.core import Batch, Call, Cond, Rng
from fewstep.diffusion import VP, Grid, Kind, NoisePath, Prediction, RectifiedFlow, Uniform, target
from fewstep.engine import train
from fewstep.engine.prepare import require_possible
from fewstep.methods import DMD2, BackwardSimulation, Nets, TransitionMatching
from fewstep.models import Denoiser, Lora
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import FRAMES, Everything, shaken, small, tiny_model
from support_gaussian import cond_of, conds_of, terms

B, SHAPE, LABELS = 6, (1, 2, 4, 4), [1, 2, 1, 1, 2, 1]
METHOD = TransitionMatching(cond_drop=0.0, flow=0.0)
HEAD = FlowHead(blocks=1, steps=2)


@dataclass(frozen=True)
class Asked:
    """One run of the head, with all times shaped to multiply clips."""

    x_t: Tensor
    t: Tensor
    y_s: Tensor
    s: Tensor
    r: Tensor
    labels: list[int]
    grad: bool


@dataclass(eq=False)
class Known(nn.Module):
    """A head that answers `made(y_s, s, r)`, to which `shift` times `way(y_s)` is added, whose gradient is looked at."""

    made: Callable[[Tensor, Tensor, Tensor], Tensor]
    way: Callable[[Tensor], Tensor] = torch.ones_like
    path: NoisePath = field(default_factory=RectifiedFlow)
    kind: Kind = "flow"

    def __post_init__(self) -> None:
        super().__init__()
        self.shift, self.asked = nn.Parameter(torch.zeros((), dtype=torch.float64)), list[Asked]()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        y_s = cond.extra["inner"]
        s, r = (cond.extra[name].double().reshape(-1, 1, 1, 1, 1) for name in ("inner_from", "inner_until"))
        self.asked.append(Asked(x_t, t, y_s, s, r, cond.text[:, 0, 0].long().tolist(), torch.is_grad_enabled()))
        return Prediction(self.made(y_s, s, r) + self.shift * self.way(y_s), self.kind, x_t, t, self.path)


def clips(name: str, size: int = B) -> Tensor:
    return Rng(3).randn((size, *SHAPE), name).double()


def batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=0.5 + clips("x0"))


def loss(method: TransitionMatching, student: Known, given: Batch | None = None) -> Tensor:
    made = terms(method.student_loss(Nets({"student": student}), given or batch(), Rng(0)))
    assert set(made) == {"mean_flow"}
    return made["mean_flow"]


def adaptive(error: Tensor, c: float = 1e-3) -> Tensor:
    square = error.square().flatten(1).mean(1)
    return (square / (square + c)).mean()


def drawn(student: Known) -> tuple[Tensor, Tensor, Tensor, Asked]:
    """y, y_1 and x0, solved from what was asked on rectified flow; and the call with gradient."""
    late, early, own = student.asked
    y_1 = (late.y_s - early.y_s) / (late.s - early.s)  # y_1 - y: how y_s moves
    y = own.y_s - own.s * y_1
    return y, y + y_1, own.x_t - own.t.double().reshape(-1, 1, 1, 1, 1) * y, own


def test_three_runs_are_on_one_line_and_one_has_a_gradient() -> None:
    student = Known(lambda y_s, s, r: torch.zeros_like(y_s))
    loss(METHOD, student)
    late, early, own = student.asked
    assert [asked.grad for asked in student.asked] == [False, False, True]
    y, y_1, x0, _ = drawn(student)
    torch.testing.assert_close(x0, 0.5 + clips("x0"), rtol=0, atol=1e-5)  # so y is eps - x0, at the time of x_t
    eps = y + x0
    assert all(abs(float(n.mean())) < 0.2 and abs(float(n.std()) - 1) < 0.2 for n in (y_1, eps))
    assert abs(float((y_1 * eps).mean())) < 0.2, "the inner noise is not that of x_t"
    for asked in student.asked:
        assert torch.equal(asked.x_t, own.x_t) and torch.equal(asked.t, own.t) and torch.equal(asked.r, own.r)
        assert asked.labels == LABELS
        torch.testing.assert_close(asked.y_s, (1 - asked.s) * y + asked.s * y_1, rtol=0, atol=1e-5)
    assert ((own.r <= own.s) & (own.s <= 1) & (own.r >= 0)).all() and len(own.s.unique()) == B
    inside = (own.s > 0.005) & (own.s < 0.995)
    torch.testing.assert_close((late.s - own.s)[inside], torch.full_like(own.s, 0.005)[inside], rtol=0, atol=1e-6)
    torch.testing.assert_close((own.s - early.s)[inside], torch.full_like(own.s, 0.005)[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("path", "kind"), [(RectifiedFlow(), "flow"), (VP(), "eps"), (VP(), "v")])
def test_where_r_is_s_it_is_flow_matching(path: NoisePath, kind: Kind) -> None:
    """The head learns y, whatever the slope is."""
    method = replace(METHOD, flow=1.0, density=Grid(times=(0.25,)))
    student = Known(lambda y_s, s, r: 3.0 * y_s * s, path=path, kind=kind)
    made = loss(method, student)
    own = student.asked[-1]
    assert torch.equal(own.s, own.r)
    rng, x0 = Rng(0), batch().require("x0")
    eps = rng.randn(x0.shape, "eps").double()
    y = target(kind, x0, eps, torch.full((B,), 0.25), path)
    torch.testing.assert_close(own.x_t, path.add_noise(x0, eps, torch.full((B,), 0.25)))
    torch.testing.assert_close(made, adaptive(y - 3.0 * own.y_s * own.s))


def test_the_goal_is_the_mean_velocity() -> None:
    """`(y_1 - y) - (s - r) du/ds`, for a head with a known slope; differences of a quadratic function are exact."""
    student = Known(lambda y_s, s, r: s * y_s - 0.3 * r * y_s)
    made = loss(METHOD, student)
    y, y_1, _, own = drawn(student)
    u = y_1 - (own.s - 0.3 * own.r) * own.y_s
    slope = -(own.y_s + (own.s - 0.3 * own.r) * (y_1 - y))
    goal = (y_1 - y) - (own.s - own.r) * slope
    torch.testing.assert_close(made, adaptive(u - goal), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(made, student.shift)
    square = (u - goal).square().flatten(1).mean(1, keepdim=True)
    expected = (-2 * (u - goal).flatten(1).mean(1, keepdim=True) / (square + 1e-3)).mean()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def mean_answer(y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """The mean of E[y | y_tau] on the way of y_s to r, for y ~ N(0, 1): y_tau grows as the root of V = (1 - tau)^2 + tau^2."""

    def whole(tau: Tensor) -> Tensor:  # of (1 - tau) / sqrt V
        centred = 2 * tau - 1
        return torch.asinh(centred) / (2 * math.sqrt(2)) - (centred.square() + 1).sqrt() / (2 * math.sqrt(2))

    wide = ((1 - s) ** 2 + s**2).sqrt()
    far = s - r > 1e-6
    slope = torch.where(far, (whole(s) - whole(r)) / torch.where(far, s - r, 1.0), (1 - s) / wide)
    return y_s / wide * slope


@pytest.mark.parametrize(("factor", "still"), [(1.0, True), (0.8, False), (1.2, False)])
def test_a_head_that_averages_the_denoised_prediction_stays(factor: float, still: bool) -> None:
    """The fixed point of lines 3 to 6 for y ~ N(0, 1), and that it falls short of the variance from pure noise."""
    count = 4000
    given = Batch(conds_of([1] * count), cond_of(0, count), SHAPE, x0=torch.zeros(count, *SHAPE, dtype=torch.float64))
    student = Known(lambda y_s, s, r: factor * mean_answer(y_s, s, r), way=lambda y_s: y_s)
    made = loss(replace(METHOD, scale=1e6), student, given)
    (gradient,) = torch.autograd.grad(1e6 * made, student.shift)
    assert (abs(float(gradient)) < 0.02) == still
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(mean_answer(one, one, 0 * one), one * math.asinh(1) / math.sqrt(2))


def test_a_share_of_the_batch_has_no_way_to_go() -> None:
    s, r = TransitionMatching(flow=0.75).interval(4000, Rng(0))
    assert abs(float((s == r).float().mean()) - 0.75) < 0.03 and (s >= r).all()
    s, r = TransitionMatching(flow=0.0).interval(4000, Rng(0))
    assert abs(float(s.mean()) - 2 / 3) < 0.02 and abs(float(r.mean()) - 1 / 3) < 0.02


def test_prompts_are_dropped_in_all_runs_alike() -> None:
    student = Known(lambda y_s, s, r: y_s)
    loss(replace(METHOD, cond_drop=1.0), student)
    assert [asked.labels for asked in student.asked] == [[0] * B] * 3


class Heard(nn.Module):
    """A network whose answers are kept."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network, self.path, self.kind, self.answers = network, network.path, network.kind, list[Tensor]()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        made = self.network(x_t, t, cond, call)
        self.answers.append(made.raw.detach())
        return made


def test_the_slope_does_not_drown_in_the_rounding_of_bfloat16() -> None:
    """A difference of two calls d apart: under autocast it is that of float32, and only the trained call is rounded."""
    model = tiny_model(depth=3).transformed(HEAD)
    shaken(model.denoiser.backbone.flow_head)
    given, heard = Everything().open(model, METHOD.needs).batch(B, Rng(0)), []
    for rounds in (False, True):
        student = Heard(model.denoiser)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            terms(METHOD.student_loss(Nets({"student": student}), given, Rng(0)))
        heard.append(student.answers)
    (late, early, own), (rounded_late, rounded_early, rounded_own) = heard
    difference, error = late - early, (rounded_late - rounded_early) - (late - early)
    assert error.norm() < 1e-4 * difference.norm()  # rounded: 1e-2, in so small a network
    assert not torch.equal(rounded_own, own)


def test_both_stages(tmp_path: Path) -> None:
    """The first gives the student its head; the second starts there, with the same transform, and ends in steps of its own."""
    model, method = tiny_model(), TransitionMatching(head=HEAD)
    first = train(model, method, Everything(), small(2), tmp_path / "first", quiet=True)
    assert first.card.transforms == (HEAD,) and first.card.contract == model.card.contract
    assert first.denoiser.backbone.flow_head.out.weight.any()  # type: ignore[union-attr, operator]
    assert first(["a red ball"], num_frames=FRAMES).isfinite().all()  # with the teacher's guidance
    begun = small(2, start=str(first.save(tmp_path / "student")), transforms=(HEAD,))
    dmd = DMD2(critic_updates=1, rollout=BackwardSimulation(grids=((1.0, 0.5),), mode="ode"))
    require_possible(dmd, begun, model.card, None)
    second = train(model, dmd, Everything(), begun, tmp_path / "second", quiet=True)
    assert second.card.transforms == (HEAD,) and second.card.contract.counts == (2,)
    again = small(1, transforms=(HEAD,))
    assert train(model, method, Everything(), again, tmp_path / "again", quiet=True).card.transforms == (HEAD,)


def test_another_head_than_the_methods_is_refused(tmp_path: Path) -> None:
    source = Pretrained(source=str(tiny_model(depth=3).save(tmp_path / "teacher")))
    recipe = Recipe(
        model=source, method=TransitionMatching(head=HEAD), data=WorldClips(num_frames=FRAMES), settings=small(1)
    )
    recipe.check()
    for settings, words in (
        (small(1, transforms=(FlowHead(blocks=2, steps=2),)), "has a flow head already"),
        (small(1, lora=Lora(rank=2)), r"needs a student that has FlowHead\(blocks=1, steps=2\); this model does not"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(recipe, settings=settings).check()
    with pytest.raises(ValueError, match="a head of 5 blocks leaves none"):
        replace(recipe, method=TransitionMatching()).check()


@pytest.mark.parametrize("change", [{"flow": 1.5}, {"delta": 0.0}, {"scale": 0.0}, {"cond_drop": -0.1}])
def test_what_is_out_of_bounds_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        TransitionMatching(density=Uniform(), **change)  # type: ignore[arg-type]


def test_the_cost_is_that_of_its_three_runs() -> None:
    student = Known(lambda y_s, s, r: torch.zeros_like(y_s))
    loss(METHOD, student)
    (work,) = METHOD.cost()
    assert work.forwards == sum(3 if asked.grad else 1 for asked in student.asked)
