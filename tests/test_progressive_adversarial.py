"""Progressive adversarial distillation: what the discriminator compares, where, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core import Batch, Rng
from fewstep.diffusion import CFG, Uniform, uniform_grid
from fewstep.engine.nets import build_nets
from fewstep.methods import Adversary, Heads, MovingBuffer, Nets, Progressive, ProgressiveAdversarial, Sync, Update
from support_engine import tiny_model
from support_gaussian import (
    AffineTableStudent,
    Asked,
    Counting,
    FreeClips,
    GaussianTeacher,
    cond_of,
    conds_of,
    f64,
    make_batch,
    normal,
    terms,
)

MEANS, STD, B, SHAPE, LABELS = f64(-0.2, 0.7, 1.5), 0.4, 4, (1, 4, 8, 8), [1, 2, 1, 1]
FROZEN = Adversary(weight=0.5)
METHOD = ProgressiveAdversarial(
    progressive=Progressive(stages=((4, 10), (2, 10)), guidance=CFG(scale=2.0)), steps=2, adversary=FROZEN
)


class Beside(nn.Module):
    """Logit: the mean of the end's feature, times `end`, and of the beginning's, times `start`."""

    def __init__(self, end: float = 1.0, start: float = 0.25) -> None:
        super().__init__()
        self.end, self.start = nn.Parameter(f64(end)), nn.Parameter(f64(start))

    def forward(self, features: list[Tensor]) -> Tensor:
        end, start = (half.flatten(1).mean(1, keepdim=True) for half in features[0].chunk(2, 1))
        return self.end * end + self.start * start


def clips(name: str) -> Tensor:
    return Rng(3).randn((B, *SHAPE), name).double()


def batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=clips("real"))


def nets() -> Nets:
    teacher, stage = (GaussianTeacher(MEANS, STD).requires_grad_(False) for _ in range(2))
    return Nets(
        {"student": FreeClips((B, *SHAPE)), "teacher": Asked(teacher), "stage": stage, "discriminator": Beside()}
    )


def turns(method: ProgressiveAdversarial, step: int) -> list[Update]:
    return [event for event in method.updates(step) if isinstance(event, Update)]


def test_each_stage_with_a_discriminator_warms_it_up() -> None:
    def trained(step: int) -> list[tuple[str, ...]]:
        return [event.roles for event in turns(replace(METHOD, warmup=3), step)]

    assert [trained(step) for step in (0, 9)] == [[("student",)]] * 2, "no discriminator, no warm-up"
    assert [trained(step) for step in (10, 11, 12)] == [[("discriminator",)]] * 3
    assert [trained(step) for step in (13, 19)] == [[("discriminator",), ("student",)]] * 2
    with pytest.raises(ValueError, match="warmup 10 leaves no update of the student in a stage of 10"):
        replace(METHOD, warmup=10)


def test_the_student_has_noise_of_its_own() -> None:
    """Line 3 is line 2 with new noise."""
    networks = nets()
    starts = []
    for update in turns(METHOD, 10):
        asked = Asked(networks.student)
        terms(update.losses(Nets({**networks.roles, "student": asked}), batch(), Rng(0)))
        starts += [question.x_t for question in asked.questions]
    assert len(starts) == 2 and not torch.equal(*starts)


def test_stages_of_many_steps_have_the_regression_and_those_of_few_the_discriminator() -> None:
    named = [
        [event.roles if isinstance(event, Update) else event for event in METHOD.updates(s)] for s in (0, 9, 10, 11)
    ]
    assert named[0] == named[1] == [("student",)]
    assert named[2] == [Sync("stage", "student"), ("discriminator",), ("student",)]
    assert named[3] == [("discriminator",), ("student",)]
    (regression,) = turns(METHOD, 0)
    assert set(terms(regression.losses(nets(), batch(), Rng(0)))) == {"halving"}


def test_the_discriminator_calls_the_models_end_real_and_sees_where_both_began() -> None:
    networks = nets()
    own, _ = turns(METHOD, 10)
    losses = terms(own.losses(networks, batch(), Rng(0)))
    real, start, fake, again = networks.teacher.questions
    x_u, u, x_s, s, _ = METHOD.progressive.walk(2, CFG(), networks, batch(), Rng(0).fold("discriminator"))
    assert torch.equal(start.x_t, x_u) and torch.equal(again.x_t, x_u) and torch.equal(start.t, u)
    assert torch.equal(real.x_t, x_s) and torch.equal(real.t, s) and torch.equal(fake.t, s)
    r = (s / u).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(
        fake.x_t, (1 - r) * networks.student.clips.detach() + r * x_u
    )  # the DDIM step, not the clip
    assert all(question.labels == LABELS for question in networks.teacher.questions)
    there, made = (q.x_t.flatten(1).mean(1) + 0.25 * x_u.flatten(1).mean(1) for q in (real, fake))
    torch.testing.assert_close(losses["discriminator"], F.softplus(-there).mean() + F.softplus(made).mean())
    losses["discriminator"].backward()
    assert networks.student.clips.grad is None


def test_the_students_gradient_is_through_the_end_of_its_step() -> None:
    networks = nets()
    _, student = turns(METHOD, 10)
    losses = terms(student.losses(networks, batch(), Rng(0)))
    assert set(losses) == {"adversarial"}
    losses["adversarial"].backward()
    fake, start = networks.teacher.questions
    logits = fake.x_t.flatten(1).mean(1) + 0.25 * start.x_t.flatten(1).mean(1)
    share = 1 - (fake.t / start.t).double()  # of the clip in the end of the step
    slope = -0.5 * torch.sigmoid(-logits) / B * share / fake.x_t[0].numel()
    torch.testing.assert_close(networks.student.clips.grad, slope.reshape(-1, 1, 1, 1, 1).expand(B, *SHAPE))


def test_at_the_end_of_a_stage_the_beginning_is_not_shown() -> None:
    method = replace(METHOD, alone=0.3)
    for step, alone in ((10, False), (16, False), (17, True), (19, True)):
        networks = nets()
        own, student = turns(method, step)
        terms(own.losses(networks, batch(), Rng(0)))
        end, beside, *_ = networks.teacher.questions
        assert torch.equal(end.x_t, beside.x_t) == alone and torch.equal(end.t, beside.t) == alone
        terms(student.losses(networks, batch(), Rng(0)))["adversarial"].backward()
        assert networks.student.clips.grad is not None


def test_a_student_that_steps_as_its_teacher_walks_is_not_told_from_it() -> None:
    """Both ends are equal, so no discriminator gains anything: the best logit is 0."""
    stage = GaussianTeacher(MEANS, STD).requires_grad_(False)
    table = [stage.compose_affine(times, float(MEANS[1])) for times in ((1.0, 0.75, 0.5), (0.5, 0.25, 0.0))]
    # the x0 prediction whose DDIM step from u to s lands on a x + b
    rows = [
        ((a - s / u) / (1 - s / u), b / (1 - s / u)) for (a, b), u, s in zip(table, (1.0, 0.5), (0.5, 0.0), strict=True)
    ]
    student = AffineTableStudent((1.0, 0.5)).fill(rows)
    networks = Nets({"student": student, "stage": stage, "teacher": Asked(stage), "discriminator": Beside()})
    terms(turns(METHOD, 10)[0].losses(networks, make_batch(8, x0=normal(8)), Rng(0)))
    real, _, fake, _ = networks.teacher.questions
    torch.testing.assert_close(real.x_t, fake.x_t, rtol=0, atol=1e-10)
    assert len(real.t.unique()) == 2


def test_guidance_is_learned_in_the_first_stage_only() -> None:
    method = replace(METHOD, steps=4)
    for step, sizes in ((0, {2 * B}), (10, {B})):
        networks = nets()
        counted = Counting(networks["stage"])
        for update in turns(method, step):
            terms(update.losses(Nets({**networks.roles, "stage": counted}), batch(), Rng(0)))
        assert {len(x) for _, x, _ in counted.calls} == sizes and len(counted.calls) == 4


def test_its_student_is_that_of_progressive_distillation() -> None:
    teacher = tiny_model().card.contract
    assert METHOD.contract(teacher) == METHOD.progressive.contract(teacher)
    assert METHOD.contract_at(teacher, 3).counts == (4,) and METHOD.contract_at(teacher, 10).counts == (2,)
    assert METHOD.contract(teacher).trained == {2: uniform_grid(2)}
    assert METHOD.lengthened(3.0).progressive.stages == ((4, 30), (2, 30))
    with pytest.raises(ValueError, match="begins after 10 iterations"):
        METHOD.check(10)


def test_the_whole_discriminator_is_trained_in_its_own_turn_on_two_views() -> None:
    method = replace(METHOD, adversary=Adversary(trained=True, r1=1.0, layers=(0, -1)))
    model = tiny_model()
    networks = build_nets(model, method, seed=0)
    assert set(networks) == {"student", "teacher", "stage", "eyes", "discriminator"}
    with torch.no_grad():
        cond, none = (model.text.encode([text] * 2) for text in ("a red circle", ""))
    shape = model.latent_shape()
    given = Batch(cond, none, shape, x0=Rng(0).randn((2, *shape), "x0"))
    own, student = turns(method, 10)
    for update in (own, student):
        for role, network in networks.items():
            network.requires_grad_(role in update.roles)
        losses = terms(update.losses(Nets(networks), given, Rng(0)))
        sum(losses.values()).backward()  # type: ignore[union-attr]
        moved = {role for role, network in networks.items() if any(p.grad is not None for p in network.parameters())}
        assert moved == set(update.roles)
        for network in networks.values():
            network.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adversary": Adversary(clean=True)}, "times of their own"),
        ({"adversary": Adversary(density=Uniform())}, "times of their own"),
        ({"steps": 1}, "the last stage has 2 steps, and only stages of at most 1"),
        ({"progressive": Progressive(history=MovingBuffer())}, "leave progressive.history as it is"),
    ],
)
def test_what_it_cannot_be_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(METHOD, **change)


def test_the_head_that_was_asked_for_reads_two_views() -> None:
    method = replace(METHOD, adversary=Adversary(head="joint", layers=(0, -1), trained=True))
    assert method.aux()["discriminator"] == Heads("eyes", (0, -1), "joint", views=2)


def test_the_shortest_stage_and_either_penalty_count() -> None:
    longer = Progressive(stages=((4, 10), (2, 20), (1, 5)))
    with pytest.raises(ValueError, match="no update of the student in a stage of 5"):
        replace(METHOD, progressive=longer, warmup=5)
    with pytest.raises(ValueError, match="write alone: 0"):
        replace(METHOD, alone=0.5, adversary=Adversary(r2=1.0))


def test_a_last_stage_that_a_run_ends_in_its_warm_up_is_refused() -> None:
    method = replace(METHOD, progressive=Progressive(stages=((4, 10), (2, 10))), warmup=4)
    method.check(15)
    for steps, left in ((14, 4), (12, 2)):
        with pytest.raises(
            ValueError, match=f"leaves {left} iterations .* warmup has 4.* settings.steps of at least 15"
        ):
            method.check(steps)
