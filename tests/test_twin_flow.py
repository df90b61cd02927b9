"""TwinFlow: each line against its formula, with a network whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.compress import ScalarInput
from fewstep.core import Batch, Call, Cond, Rng
from fewstep.diffusion import VP, Prediction, RectifiedFlow
from fewstep.engine import train
from fewstep.engine.outline import Outline
from fewstep.engine.prepare import require_possible
from fewstep.methods import DMD2, Nets, TwinFlow
from fewstep.models import Lora
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips
from support_engine import FRAMES, Everything, small, stored_card, tiny_model
from support_gaussian import cond_of, conds_of

B, SHAPE, LABELS, MEAN, STD = 6, (1, 2, 4, 4), [1, 2, 1, 1, 2, 1], 0.7, 0.4
METHOD = TwinFlow(cond_drop=0.0, strength=0.5)


@dataclass(frozen=True)
class Asked:
    x_t: Tensor
    t: Tensor
    until: Tensor
    twin: bool
    labels: list[int]
    grad: bool


class Known(nn.Module):
    """F of clips that are normal around `mean`, exactly: velocities, and mean velocities where `until` is earlier; F' the same of
    clips around `fake`. `shift`, whose gradient is looked at, is added to every answer."""

    def __init__(self, mean: float = MEAN, fake: float = -0.3, std: float = STD) -> None:
        super().__init__()
        self.mean, self.fake, self.std, self.path = mean, fake, std, RectifiedFlow()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.asked: list[Asked] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        until, twin = cond.extra["until"], bool(cond.extra["twin"][0])
        labels = cond.text[:, 0, 0].long()
        self.asked.append(Asked(x_t.detach(), t, until, twin, labels.tolist(), torch.is_grad_enabled()))
        centre = (torch.full_like(t, self.fake) if twin else self.mean + 0.1 * labels).reshape(-1, 1, 1, 1, 1)
        return Prediction(self.mean_velocity(x_t, t, until, centre) + self.shift, "flow", x_t, t, self.path)

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor, centre: Tensor) -> Tensor:
        t, r = (each.reshape(-1, 1, 1, 1, 1) for each in (t, r))
        wide = lambda s: ((1 - s) ** 2 * self.std**2 + s**2).sqrt()  # noqa: E731
        x_r = (1 - r) * centre + wide(r) / wide(t) * (x - (1 - t) * centre)
        x0 = centre + (1 - t) * self.std**2 / wide(t) ** 2 * (x - (1 - t) * centre)
        now = (x - x0) / t.clamp_min(1e-9)
        return torch.where(t == r, now, (x - x_r) / torch.where(t == r, 1.0, t - r))


def batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=MEAN + STD * Rng(3).randn((B, *SHAPE), "x0").double())


def adaptive(error: Tensor) -> Tensor:
    square = error.square().flatten(1).mean(1)
    return (square / (square + 1e-6).sqrt()).mean()


def nets() -> Nets:
    return Nets({"student": Known()})


def test_the_velocity_is_regressed_with_a_guidance_of_its_own() -> None:
    networks = nets()
    loss = METHOD.flow(networks, batch(), Rng(0))["flow"]
    own, none = networks.student.asked
    assert torch.equal(own.until, own.t) and not own.twin and own.grad
    assert none.labels == [0] * B and own.labels == LABELS and not none.grad and torch.equal(none.x_t, own.x_t)
    x0, t = batch().require("x0"), own.t.reshape(-1, 1, 1, 1, 1)
    eps = (own.x_t - (1 - t) * x0) / t
    centre = MEAN + 0.1 * torch.tensor(LABELS).double().reshape(-1, 1, 1, 1, 1)
    made, free = (
        networks.student.mean_velocity(own.x_t, own.t, own.t, c) for c in (centre, torch.full_like(centre, MEAN))
    )
    torch.testing.assert_close(loss.detach(), adaptive(made - (eps - x0) - 0.5 * (made - free)))


def test_dropped_prompts_have_no_guidance() -> None:
    networks = nets()
    METHOD.flow(networks, batch(), Rng(0))
    dropped = nets()
    replace(METHOD, cond_drop=1.0).flow(dropped, batch(), Rng(0))
    assert dropped.student.asked[0].labels == [0] * B and networks.student.asked[0].labels == LABELS


def test_exact_mean_velocities_are_consistent_and_velocities_are_not() -> None:
    networks, method = nets(), replace(METHOD, delta=1e-4, scale=1.0)
    loss = method.consistency(networks, batch(), Rng(0))["consistency"]
    assert float(loss.detach()) < 1e-12
    made, *steps = networks.student.asked
    assert [torch.equal(each.until, each.t) for each in steps] == [True, True, False]
    assert torch.equal(steps[2].until, made.until) and made.grad and not any(each.grad for each in steps)
    ends = made.t == 1
    assert 0 < int(ends.sum()) < B and bool((made.until[ends] == 0).all()) and bool((made.until < made.t).all())
    networks.student.mean_velocity = lambda x, t, r, c: Known.mean_velocity(networks.student, x, t, t, c)
    assert float(method.consistency(networks, batch(), Rng(0))["consistency"].detach()) > 1e-8


def test_the_twin_learns_the_students_clips() -> None:
    networks = nets()
    loss = METHOD.twin(networks, batch(), Rng(0))["twin"]
    one, twin = networks.student.asked
    assert bool((one.t == 1).all()) and bool((one.until == 0).all()) and not one.twin and not one.grad
    assert twin.twin and twin.grad and torch.equal(twin.t, twin.until) and len(twin.t.unique()) == B
    centre = MEAN + 0.1 * torch.tensor(LABELS).double().reshape(-1, 1, 1, 1, 1)
    y = one.x_t - networks.student.mean_velocity(one.x_t, one.t, one.until, centre)
    t = twin.t.reshape(-1, 1, 1, 1, 1)
    eps = (twin.x_t - (1 - t) * y) / t
    assert abs(float(eps.std()) - 1) < 0.2 and not torch.allclose(eps, one.x_t), "noise of its own"
    made = networks.student.mean_velocity(twin.x_t, twin.t, twin.t, torch.full_like(centre, -0.3))
    torch.testing.assert_close(loss.detach(), adaptive(made - (eps - y)))


def test_a_clip_moves_from_what_the_twin_expects_to_what_is_real() -> None:
    """With exact branches D = (x0_real - x0_fake) / s, and descent moves the clip along D."""
    networks, method = (
        nets(),
        replace(METHOD, scale=1e6, rectify=1.0, clamp=100.0),
    )  # the distance is the mean square / c
    loss = method.rectified(networks, batch(), Rng(0))["rectify"]
    (slope,) = torch.autograd.grad(loss, networks.student.shift)
    one, fake, real = networks.student.asked
    assert one.grad and not fake.grad and not real.grad and fake.twin and not real.twin
    assert torch.equal(fake.x_t, real.x_t) and torch.equal(fake.t, fake.until)
    s, centre = fake.t.reshape(-1, 1, 1, 1, 1), MEAN + 0.1 * torch.tensor(LABELS).double().reshape(-1, 1, 1, 1, 1)

    def clean(mean: Tensor) -> Tensor:
        return mean + (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2) * (fake.x_t - (1 - s) * mean)

    gap = (clean(centre) - clean(torch.full_like(centre, -0.3))) / s
    torch.testing.assert_close(slope, (2 * gap).mean() / 1e6)  # of F, and a clip is z - F: it moves along +gap
    assert float(gap.mean()) > 0


def test_errors_and_differences_are_clamped() -> None:
    networks = nets()
    wide, narrow = (replace(METHOD, clamp=c, scale=1e-9, rectify=1.0) for c in (100.0, 1e-3))
    assert float(narrow.rectified(networks, batch(), Rng(0))["rectify"].detach()) <= 1.001e-3
    assert float(wide.rectified(networks, batch(), Rng(0))["rectify"].detach()) > 0.1
    networks.student.mean_velocity = lambda x, t, r, c: (
        Known.mean_velocity(networks.student, x, t, t, c) * (1 + 9 * (t != r)[:, None, None, None, None])
    )
    assert float(narrow.consistency(networks, batch(), Rng(0))["consistency"].detach()) <= 1.001e-3
    assert float(wide.consistency(networks, batch(), Rng(0))["consistency"].detach()) > 0.1


def test_every_line_has_a_graph_of_its_own() -> None:
    terms = list(METHOD.student_loss(nets(), batch(), Rng(0)))
    assert [set(each) for each in terms] == [{"flow"}, {"consistency"}, {"twin"}, {"rectify"}]


def test_a_path_that_is_not_straight_is_refused() -> None:
    networks = nets()
    networks.student.path = VP()
    with pytest.raises(ValueError, match="straight paths; this model has VP"):
        list(METHOD.student_loss(networks, batch(), Rng(0)))


def test_a_network_learns_to_read_what_it_needs(tmp_path: Path) -> None:
    """Its inputs are added where they are missing, planned, saved, and 0 where the student is sampled."""
    model, method = tiny_model(), TwinFlow()
    inputs = tuple(ScalarInput(name=name, default=0.0) for name in ("until", "twin"))
    student = train(model, method, Everything(), small(2), tmp_path / "run", quiet=True)
    assert student.card.transforms == inputs and student.card.contract.counts == (1, 2)
    scalars = student.denoiser.backbone.scalars
    assert all(bool(scalars[name].out.weight.any()) for name in ("until", "twin"))
    assert student(["a red ball"], num_frames=FRAMES).isfinite().all()
    plan = Outline.of(stored_card(model), method, small(2), FRAMES).plan()
    (held,) = (each for each in plan.holdings if each.role == "student")
    assert held.parameters == sum(p.numel() for p in student.denoiser.parameters())
    again = train(student, method, Everything(), small(1), tmp_path / "again", quiet=True)
    assert again.card.transforms == inputs
    begun = small(1, start=str(student.save(tmp_path / "student")))
    require_possible(
        method, begun, model.card, None
    )  # it has the teacher's transforms and those inputs, as this run's has
    with pytest.raises(ValueError, match="no student of this teacher"):
        require_possible(DMD2(), begun, model.card, None)


def test_adapters_cannot_learn_to_read(tmp_path: Path) -> None:
    """Whoever checks a recipe learns it, before any weight is loaded."""
    source = Pretrained(source=str(tiny_model().save(tmp_path / "teacher")))
    recipe = Recipe(model=source, method=TwinFlow(), data=WorldClips(), settings=small(1, lora=Lora(rank=2)))
    words = r"TwinFlow needs a student that has ScalarInput\(name='until'\) and .*'twin'.*; this model does not"
    with pytest.raises(ValueError, match=words):
        recipe.check()


def test_the_way_of_a_mean_velocity_is_two_steps_and_the_rest() -> None:
    method, d = replace(METHOD, delta=0.1), 0.1
    for n in range(12):
        networks = nets()
        method.consistency(networks, batch(), Rng(0, n))
        own, one, two, rest = networks.student.asked
        assert bool((own.t >= 2 * d).all()) and bool((own.until >= 0).all())
        assert bool((own.until <= own.t - 2 * d + 1e-6).all()), "the mean velocity goes on where the two steps have led"
        assert torch.equal(one.x_t, own.x_t) and torch.equal(one.t, own.t)
        centre = MEAN + 0.1 * torch.tensor(LABELS).double().reshape(-1, 1, 1, 1, 1)
        for now, then in ((one, two), (two, rest)):
            torch.testing.assert_close(then.t, now.t - d)
            velocity = networks.student.mean_velocity(now.x_t, now.t, now.t, centre)
            torch.testing.assert_close(then.x_t, now.x_t - d * velocity)


def test_the_rectification_has_its_weight_and_the_cost_is_that_of_the_calls() -> None:
    one, less = (replace(METHOD, rectify=w).rectified(nets(), batch(), Rng(0))["rectify"] for w in (1.0, 0.25))
    torch.testing.assert_close(less, 0.25 * one)
    for method in (METHOD, replace(METHOD, strength=0.0)):
        networks = nets()
        list(method.student_loss(networks, batch(), Rng(0)))
        (work,) = method.cost()
        assert work.forwards == sum(3 if asked.grad else 1 for asked in networks.student.asked)


def test_clips_are_never_compared_without_noise() -> None:
    y = torch.zeros(4096, *SHAPE, dtype=torch.float64)
    _, t, _ = METHOD.noised(nets(), y, Rng(0))
    assert 0.02 <= float(t.min()) < 0.03 and float(t.max()) <= 1
