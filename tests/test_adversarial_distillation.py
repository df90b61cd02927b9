"""LADD, ADD, SF-V and APT as one method: its terms against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch.nn import functional as F

from fewstep.core import Batch, Rng
from fewstep.core.shipped import shipped
from fewstep.diffusion import CFG, Uniform
from fewstep.engine.nets import build_nets
from fewstep.leaderboard.stages import stages_of
from fewstep.methods import AVDM2, AdversarialDistillation, Adversary, BackwardSimulation, FromData, FromPairs, Nets
from fewstep.models.source import Diffusers, Pretrained
from fewstep.models.video_dit import MLP
from fewstep.pipeline import read
from support_engine import tiny_model
from support_gaussian import ONE_STEP, Asked, FreeClips, GaussianTeacher, MeanHead, cond_of, conds_of, f64, terms
from tiny_models import shared

B, SHAPE, LABELS, MEAN, STD = 4, (1, 4, 8, 8), [1, 2, 1, 1], 0.7, 0.4
METHOD = AdversarialDistillation(
    rollout=ONE_STEP, adversary=Adversary(weight=0.5, density=Uniform(low=0.3, high=0.4)), guidance=CFG(scale=2.5)
)


def clips(name: str) -> torch.Tensor:
    return Rng(3).randn((B, *SHAPE), name).double()


def make_batch() -> Batch:
    return Batch(conds_of(LABELS), cond_of(0, B), SHAPE, x0=3 + clips("real"))


def nets() -> Nets:
    teacher = GaussianTeacher(f64(-0.2, 0.7, 1.5), 0.4).requires_grad_(False)
    return Nets({"student": FreeClips((B, *SHAPE)), "teacher": Asked(teacher), "discriminator": MeanHead()})


def test_the_student_gets_the_gradient_of_the_discriminator_alone() -> None:
    networks = nets()
    losses = terms(METHOD.student_loss(networks, make_batch(), Rng(0)))
    assert set(losses) == {"adversarial"}
    losses["adversarial"].backward()
    (seen,), made = networks.teacher.questions, networks.student.clips
    logits = seen.x_t.flatten(1).mean(1)
    slope = -0.5 * torch.sigmoid(-logits) / B * (1 - seen.t.double()) / made[0].numel()
    torch.testing.assert_close(made.grad, slope.reshape(-1, 1, 1, 1, 1).expand_as(made))
    assert all(p.grad is None for p in networks.teacher.parameters())


class Perfect(torch.nn.Module):
    """The logit `log p(x_t) / q(x_t)` per element, of N(mean, STD^2) against N(own mean, STD^2), both noised: its best value."""

    def __init__(self, mean: float, own: float, t: float) -> None:
        super().__init__()
        self.variance = (1 - t) ** 2 * STD**2 + t * t
        self.means = (1 - t) * f64(mean, own)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        (x_t,) = features
        from_data, from_student = ((x_t - mean) ** 2 / (2 * self.variance) for mean in self.means)
        return (from_student - from_data).flatten(1)


@pytest.mark.parametrize("own", [0.2, 1.5, MEAN])
def test_a_perfect_discriminator_moves_the_student_to_the_mean_of_the_data(own: float) -> None:
    """Of clips N(own, STD^2) the mean has the gradient `-E sigmoid(-l) a^2 (m - own) / V`, which is 0 at the data's m."""
    t, size = 0.4, 64
    adversary = Adversary(weight=1.0, density=Uniform(low=t, high=t))
    student = FreeClips((size, *SHAPE))
    with torch.no_grad():
        student.clips.mul_(STD).add_(own)
    networks = Nets({**nets(), "student": student, "discriminator": Perfect(MEAN, own, t)})
    batch = Batch(conds_of([1] * size), cond_of(0, size), SHAPE, x0=torch.zeros(size, *SHAPE).double())
    terms(replace(METHOD, adversary=adversary).student_loss(networks, batch, Rng(0)))["adversarial"].backward()
    (seen,) = networks.teacher.questions
    logits, slope = networks.discriminator([seen.x_t]), 0.6**2 * (MEAN - own) / (0.6**2 * STD**2 + t * t)
    assert float(student.clips.grad.sum()) == pytest.approx(float(-(torch.sigmoid(-logits) * slope).mean()), rel=1e-6)
    assert (float(student.clips.grad.sum()) < 0) == (own < MEAN)


def test_the_discriminator_compares_real_clips_with_the_students() -> None:
    networks, batch = nets(), make_batch()
    losses = terms(METHOD.discriminator_loss(0, networks, batch, Rng(0)))
    real, fake = networks.teacher.questions
    for question, clean in ((real, batch.require("x0")), (fake, networks.student.clips.detach())):
        t = question.t.double().reshape(-1, 1, 1, 1, 1)
        assert abs(float(((question.x_t - (1 - t) * clean) / t).std()) - 1) < 0.15
        assert question.labels == LABELS
    d_real, d_fake = (question.x_t.flatten(1).mean(1) for question in (real, fake))
    torch.testing.assert_close(losses["discriminator"], F.softplus(-d_real).mean() + F.softplus(d_fake).mean())
    again = terms(METHOD.discriminator_loss(1, networks, batch, Rng(0)))["discriminator"]
    assert not torch.equal(again, losses["discriminator"]), "every turn has its own samples"


def test_the_students_clips_have_no_gradient_in_the_discriminators_turn() -> None:
    networks = nets()
    asked = Asked(networks.student)
    terms(METHOD.discriminator_loss(0, Nets({**networks.roles, "student": asked}), make_batch(), Rng(0)))
    assert [question.grad for question in asked.questions] == [False]


def test_the_teachers_opinion_is_adds() -> None:
    """lambda a_t |x - guided teacher(x_t)|^2, with no gradient through the teacher."""
    networks, method = nets(), replace(METHOD, distillation=2.5, distillation_density=Uniform(low=0.6, high=0.7))
    terms(method.student_loss(networks, make_batch(), Rng(0)))["distillation"].backward()
    seen, made = networks.teacher.questions[-1], networks.student.clips
    assert seen.labels == [*LABELS, *[0] * B]
    assert not seen.grad
    x_t, t = seen.x_t[:B], seen.t[:B]
    teacher = networks.teacher.net
    plain, free = (teacher(x_t, t, cond).x0 for cond in (conds_of(LABELS), cond_of(0, B)))
    wanted = 2.5 * (1 - t.double()).reshape(-1, 1, 1, 1, 1) * 2 * (made.detach() - (free + 2.5 * (plain - free)))
    torch.testing.assert_close(made.grad, wanted / made.numel())
    noise = (x_t - (1 - t.double()).reshape(-1, 1, 1, 1, 1) * made.detach()) / t.double().reshape(-1, 1, 1, 1, 1)
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.1, "it is asked about the student's clip"


def test_a_clip_is_compared_with_the_one_it_was_predicted_from() -> None:
    networks, batch = nets(), make_batch()
    method = replace(METHOD, rollout=FromData(), regression=0.1)
    loss = terms(method.student_loss(networks, batch, Rng(0)))["regression"]
    error = networks.student.clips.detach() - batch.require("x0")
    torch.testing.assert_close(loss.detach(), 0.1 * ((error.square() + 1e-6).sqrt() - 1e-3).mean())
    wide = terms(replace(method, huber=0.5).student_loss(networks, batch, Rng(0)))["regression"]
    torch.testing.assert_close(wide.detach(), 0.1 * ((error.square() + 0.25).sqrt() - 0.5).mean())


def test_clean_clips_are_shown_as_they_are_at_times_that_vary() -> None:
    networks, batch = nets(), make_batch()
    method = replace(METHOD, adversary=replace(METHOD.adversary, clean=True))
    terms(method.discriminator_loss(0, networks, batch, Rng(0)))
    real, fake = networks.teacher.questions
    assert torch.equal(real.x_t, batch.require("x0"))
    assert torch.equal(fake.x_t, networks.student.clips.detach())
    assert len(real.t.unique()) == B


def test_a_whole_discriminator_learns_in_its_own_turn_only() -> None:
    method = AdversarialDistillation(
        rollout=BackwardSimulation(grids=((1.0,),)),
        adversary=Adversary(trained=True, clean=True, density=Uniform(), r1=1.0, layers=(0, -1)),
    )
    model = tiny_model()
    networks = build_nets(model, method, seed=0)
    assert set(networks) == {"student", "teacher", "eyes", "discriminator"}
    with torch.no_grad():
        cond, none = (model.text.encode([text] * 2) for text in ("a red circle", ""))
    shape = model.latent_shape()
    batch = Batch(cond, none, shape, x0=Rng(0).randn((2, *shape), "x0"))
    own, student = method.updates(0)
    assert own.roles == ("eyes", "discriminator")
    for update in (own, student):
        for role, network in networks.items():
            network.zero_grad()
            network.requires_grad_(role in update.roles)
        torch.stack(list(terms(update.losses(networks, batch, Rng(0))).values())).sum().backward()
        assert {role for role in networks if any(p.grad is not None for p in networks[role].parameters())} == {
            *update.roles
        }


@pytest.mark.parametrize("name", ["leaderboard/gdd", "wan21_1p3b/gdd"])
def test_gdd_freezes_feed_forward_layers_and_patches_and_nothing_else(name: str) -> None:
    """The names in both recipes, for their own networks: attention, norms and times are trained (2405.20750)."""
    source = Pretrained(source="world") if name == "leaderboard/gdd" else Diffusers(source=str(shared("wan")))
    network, (stage,) = source.load(parts=("denoiser",)).denoiser, stages_of(read(shipped()[name], []))
    wanted = {
        f"{path}.{inner}"
        for path, module in network.named_modules()
        if isinstance(module, (MLP, FeedForward)) or path.endswith((".patches", ".patch_embedding"))
        for inner, _ in module.named_parameters()
    }
    optim = stage.settings.optim["student"]
    assert {key for key, _ in network.named_parameters() if not optim.trains(key)} == wanted
    assert len(wanted) >= 2 + 2 * len(network.backbone.blocks)


def test_fields_say_who_is_there_and_what_it_costs() -> None:
    assert METHOD.needs == {"prompts", "x0"}
    assert METHOD.critic is None
    forwards = lambda method: sum(work.forwards for work in method.cost())  # noqa: E731
    assert forwards(METHOD) == 1 + 3 + 2 + 2
    assert forwards(replace(METHOD, distillation=1.0)) == forwards(METHOD) + 2
    whole = replace(METHOD, adversary=replace(METHOD.adversary, trained=True))
    assert forwards(whole) == 1 + 3 + 6 + 2


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="give it a density"):
        AdversarialDistillation(adversary=Adversary())
    with pytest.raises(ValueError, match="does not begin with a noised clip"):
        replace(METHOD, regression=0.1)


def test_the_discriminator_has_as_many_turns_as_it_is_given() -> None:
    method = replace(METHOD, discriminator_updates=3)
    assert [update.roles for update in method.updates(0)] == [("discriminator",)] * 3 + [("student",)]
    networks, batch = nets(), make_batch()
    each = [terms(turn.losses(networks, batch, Rng(0)))["discriminator"].item() for turn in list(method.updates(0))[:3]]
    assert len(set(each)) == 3, "new samples in every turn"
    assert sum(work.forwards for work in method.cost()) == (3 + 3) + (3 * 2 + 2)


def test_what_a_rollout_needs_is_needed() -> None:
    for method in (AdversarialDistillation(rollout=FromPairs()), AVDM2(rollout=FromPairs())):
        assert method.needs == {"prompts", "x0", "pairs"} and method.rollouts == (method.rollout,)
