"""The adversarial part that methods hold: its losses, penalties and times, on a discriminator that can be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import Uniform
from fewstep.methods import Adversary, Nets, targets
from fewstep.methods.adversary import Shown
from support_gaussian import RF, Asked, GaussianTeacher, MeanHead, cond_of, conds_of, f64

B, SHAPE = 64, (1, 2, 4, 4)


def clips(name: str) -> Tensor:
    return Rng(5).randn((B, *SHAPE), name).double()


def nets(weight: float = 1.5) -> Nets:
    teacher = GaussianTeacher(f64(0, 1), 0.5).requires_grad_(False)
    return Nets({"teacher": Asked(teacher), "discriminator": MeanHead(weight)})


def shown(x: Tensor) -> Shown:
    return Shown(x, torch.full((B,), 0.5, dtype=torch.float64), cond_of(1, B))


def mean(x: Tensor) -> Tensor:
    return 1.5 * x.flatten(1).mean(1)


@pytest.mark.parametrize("loss", ["softplus", "hinge", "relativistic"])
def test_each_loss_is_what_its_paper_says(loss: targets.Gan) -> None:
    real, fake = clips("real") + 0.3, clips("fake").requires_grad_()
    adversary, networks = Adversary(weight=0.2, loss=loss), nets()
    d = adversary.discriminator_losses(networks, shown(real), shown(fake.detach()), Rng(0))["discriminator"]
    g = adversary.student_loss(networks, shown(real), shown(fake))
    r, f = mean(real), mean(fake)
    wanted = {
        "softplus": (F.softplus(-r).mean() + F.softplus(f).mean(), F.softplus(-f).mean()),
        "hinge": ((1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean(), -f.mean()),
        "relativistic": (F.softplus(-(r - f)).mean(), F.softplus(-(f - r)).mean()),
    }[loss]
    torch.testing.assert_close((d, g), (wanted[0], 0.2 * wanted[1]))
    assert adversary.paired == (loss == "relativistic")


@pytest.mark.parametrize("loss", ["softplus", "hinge", "relativistic"])
def test_the_student_climbs_and_the_discriminator_tells_apart(loss: targets.Gan) -> None:
    real, fake, adversary, networks = clips("real") + 1, clips("fake").requires_grad_(), Adversary(loss=loss), nets(0.5)
    adversary.student_loss(networks, shown(real), shown(fake)).backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all(), "descent makes the logits of the student's clips larger"
    networks.discriminator.weight.grad = None
    adversary.discriminator_losses(networks, shown(real), shown(fake.detach()), Rng(0))["discriminator"].backward()
    assert networks.discriminator.weight.grad < 0, "real clips have the larger mean: their logits rise"


def test_equal_clips_tell_the_relativistic_loss_nothing_about_the_heads() -> None:
    same, adversary, networks = clips("real"), Adversary(loss="relativistic"), nets()
    loss = adversary.discriminator_losses(networks, shown(same), shown(same), Rng(0))["discriminator"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert float(networks.discriminator.weight.grad) == 0


def test_the_relativistic_loss_compares_pairs() -> None:
    """A clip counts by how its own pair compares; real clips have no gradient."""
    real, fake = clips("real").requires_grad_(), clips("fake").requires_grad_()
    adversary, networks = Adversary(loss="relativistic"), nets()
    adversary.student_loss(networks, shown(real), shown(fake)).backward()
    assert fake.grad is not None
    slope = -0.03 * torch.sigmoid(mean(real) - mean(fake)) * 1.5 / B / real[0].numel()
    torch.testing.assert_close(fake.grad, slope.detach().reshape(-1, 1, 1, 1, 1).expand_as(fake))
    assert real.grad is None


def test_penalties_are_the_squared_gradient_of_a_linear_discriminator() -> None:
    """`lambda rho^2 |a|^2` for D(x) = a . x, here a = 1.5 / n in each of n elements."""
    adversary = Adversary(r1=2.0, r2=3.0, rho=0.1)
    losses = [
        adversary.discriminator_losses(nets(), shown(clips("real")), shown(clips("fake")), Rng(s)) for s in range(40)
    ]
    gradient = 1.5**2 / math.prod(SHAPE)
    for name, weight in (("r1", 2.0), ("r2", 3.0)):
        found = torch.stack([each[name] for each in losses]).mean()
        assert float(found) == pytest.approx(weight * 0.1**2 * gradient, rel=0.1)


def test_r2_is_about_generated_clips() -> None:
    networks = nets()
    fake = clips("fake")
    Adversary(r2=1.0).discriminator_losses(networks, shown(clips("real")), shown(fake), Rng(0))
    _, _, moved = networks.teacher.questions
    assert abs(float((moved.x_t - fake).std()) - 0.1) < 0.01


def test_a_penalty_moves_the_noised_clip_itself_at_its_own_time_and_prompt() -> None:
    """`x_t + rho n`: n does not depend on the clip, the other penalty has another, and nothing else changes."""
    moves = {}
    for scale in (0.0, 3.0):
        networks, real, fake = nets(), shown(scale * clips("real")), shown(scale * clips("fake"))
        Adversary(r1=1.0, r2=1.0, rho=0.2).discriminator_losses(networks, real, fake, Rng(0))
        for name, at, clip in (("r1", 2, real), ("r2", 3, fake)):
            asked = networks.teacher.questions[at]
            assert torch.equal(asked.t, clip.t) and asked.labels == [1] * B
            moves[name, scale] = asked.x_t - clip.x_t
            assert float(moves[name, scale].std()) == pytest.approx(0.2, rel=0.05)
    for name in ("r1", "r2"):
        torch.testing.assert_close(moves[name, 0.0], moves[name, 3.0])
    assert float((moves["r1", 0.0] * moves["r2", 0.0]).mean()) == pytest.approx(0.0, abs=0.2 * 0.2 / 5)


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_a_penalty_has_its_gradient_at_both_of_its_points(name: str) -> None:
    """For D = w mean(x) the penalty is w^2 times what does not depend on w."""
    networks = nets()
    adversary = Adversary(**{name: 2.0})  # type: ignore[arg-type]
    penalty = adversary.discriminator_losses(networks, shown(clips("real")), shown(clips("fake")), Rng(0))[name]
    penalty.backward()
    assert networks.discriminator.weight.grad.item() == pytest.approx(2 * penalty.item() / 1.5, rel=1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_the_discriminators_losses_have_no_gradient_in_the_clips(trained: bool) -> None:
    frozen = nets()
    networks = Nets({**frozen.roles, "eyes": frozen.teacher})
    real, fake = clips("real").requires_grad_(), clips("fake").requires_grad_()
    adversary = Adversary(r1=1.0, r2=1.0, trained=trained)
    sum(adversary.discriminator_losses(networks, shown(real), shown(fake), Rng(0)).values(), f64(0.0)).backward()
    assert real.grad is None and fake.grad is None


def test_clips_have_times_of_their_own_only_where_they_have_a_density() -> None:
    batch = Batch(cond_of(1, B), cond_of(0, B), SHAPE, x0=clips("real"))
    given = (clips("eps"), torch.full((B,), 0.25, dtype=torch.float64))
    real, fake = Adversary().pair(nets(), batch, clips("fake"), batch.cond, Rng(0), given)
    assert torch.equal(real.t, given[1])
    assert torch.equal(fake.t, given[1])
    torch.testing.assert_close(real.x_t, RF.add_noise(clips("real"), *given))
    torch.testing.assert_close(fake.x_t, RF.add_noise(clips("fake"), *given))
    own = Adversary(density=Uniform(low=0.5, high=0.6))
    real, fake = own.pair(nets(), batch, clips("fake"), batch.cond, Rng(0), given)
    assert not torch.equal(real.t, fake.t)
    assert float(torch.cat([real.t, fake.t]).min()) >= 0.5


class PromptHead(torch.nn.Module):
    """Logits from where the asked prompt's mean lies: `Heads` on a teacher that shows both."""

    def forward(self, features: list[Tensor]) -> Tensor:
        x, label = features
        return -(x.flatten(1).mean(1, keepdim=True) - label).abs()


class Prompted(Asked):
    """Features are the clip and the label of its prompt."""

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, *rest: object) -> list[Tensor]:
        return [*super().features(x_t, t, cond), cond.text[:, :1, 0].to(x_t)]


@pytest.mark.parametrize("loss", ["softplus", "hinge", "relativistic"])
def test_a_mismatched_prompt_counts_as_generated(loss: targets.Gan) -> None:
    """Real clips 0, 1, 2, 3 under their own prompts, and under those of the next."""
    labels = torch.arange(4.0).double()
    real = labels.reshape(4, 1, 1, 1, 1).expand(4, *SHAPE)
    fake = real + 0.5
    teacher = Prompted(GaussianTeacher(f64(0, 1), 0.5).requires_grad_(False))
    networks = Nets({"teacher": teacher, "discriminator": PromptHead()})
    cond = Cond.cat([cond_of(int(label), 1) for label in labels])
    there, made = (Shown(x, torch.full((4,), 0.5).double(), cond) for x in (real, fake))
    own, half, wrong = torch.zeros(4).double(), torch.full((4,), -0.5).double(), -f64(1, 1, 1, 3)
    wanted = {
        "softplus": F.softplus(-own).mean() + (F.softplus(half).mean() + F.softplus(wrong).mean()) / 2,
        "hinge": 1 + ((1 + half).clamp_min(0).mean() + (1 + wrong).clamp_min(0).mean()) / 2,
        "relativistic": (F.softplus(half - own).mean() + F.softplus(wrong - own).mean()) / 2,
    }[loss]
    adversary = Adversary(loss=loss, mismatched=True)
    found = adversary.discriminator_losses(networks, there, made, Rng(0))["discriminator"]
    torch.testing.assert_close(found, wanted)
    assert teacher.questions[-1].labels == [1, 2, 3, 0]
    torch.testing.assert_close(teacher.questions[-1].x_t, real)


def test_a_prompt_without_a_neighbour_is_refused() -> None:
    networks, one = nets(), shown(clips("real")[:1])
    alone = Shown(one.x_t, one.t[:1], cond_of(1, 1))
    with pytest.raises(ValueError, match="batch at least 2"):
        Adversary(mismatched=True).discriminator_losses(networks, alone, alone, Rng(0))
    twice = Shown(
        *(x[:1].repeat(2, *[1] * (x.ndim - 1)) for x in (alone.x_t, alone.t)),
        alone.cond[torch.zeros(2, dtype=torch.long)],
    )
    with pytest.raises(ValueError, match="settings.batch at least 2"):  # one clip, drawn twice
        Adversary(mismatched=True, density=Uniform(), draws=2).discriminator_losses(networks, twice, twice, Rng(0))


def test_every_draw_shows_all_clips_at_times_and_noises_of_their_own() -> None:
    batch = Batch(conds_of(list(range(B))), cond_of(0, B), SHAPE, x0=clips("real"))
    adversary = Adversary(density=Uniform(low=0.2, high=0.9), draws=3)
    real, fake = adversary.pair(nets(), batch, clips("fake"), batch.cond, Rng(0))
    assert real.x_t.shape == fake.x_t.shape == (3 * B, *SHAPE)
    assert real.cond.text[:, 0, 0].tolist() == fake.cond.text[:, 0, 0].tolist() == list(range(B)) * 3
    assert len(set(real.t.tolist())) == 3 * B
    t = real.t.reshape(-1, 1, 1, 1, 1)
    noise = (real.x_t - (1 - t) * clips("real").repeat(3, 1, 1, 1, 1)) / t
    first, second, third = noise.chunk(3)
    assert abs(float((first * second).mean())) < 0.1
    assert abs(float((second * third).mean())) < 0.1
    assert float(noise.var()) == pytest.approx(1, abs=0.1)


def test_its_work_counts_every_clip_that_it_reads() -> None:
    assert Adversary().work(2).forwards == 2 * 2 + 2
    assert Adversary(r1=1.0, r2=1.0).work(2).forwards == 2 * 4 + 2
    assert Adversary(loss="relativistic").work(2).forwards == 2 * 2 + 3
    assert Adversary(draws=3, density=Uniform()).work(2, asked=1).forwards == 3 * (2 * 2 + 2) + 1
    assert Adversary(mismatched=True).work(2).forwards == 2 * 3 + 2
    assert Adversary(density=Uniform(), draws=3).work(2).forwards == 3 * (2 * 2 + 2)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one, such as"):
        Adversary(layers=())
    with pytest.raises(ValueError, match=r"names a block twice.*write each once, got \[2, 4, 2\]"):
        Adversary(layers=(2, 4, 2))
    with pytest.raises(ValueError, match="weight"):
        Adversary(weight=0.0)
    with pytest.raises(ValueError, match="rho"):
        Adversary(rho=0.0)
    with pytest.raises(ValueError, match="density, or write draws: 1"):
        Adversary(draws=2)
