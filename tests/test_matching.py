"""Matchings against closed forms: a Gaussian student and a Gaussian teacher, expectations by quadrature in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.core import Batch, Cond, Rng
from fewstep.diffusion import CFG, Uniform
from fewstep.methods import DMD2, Adversary, Nets, targets
from fewstep.methods.matching import FDivergence, Fisher, Matching, Noised, ReverseKL, ScoreImplicit, Scores
from fewstep.methods.motion import motion_matching
from support_gaussian import RF, SCALAR, Asked, GaussianTeacher, cond_of, f64

MEAN, STD = 0.7, 0.8
"""The teacher's samples are N(MEAN, STD^2)."""
MU, RHO = 0.3, math.log(0.6)
"""The student's are MU + exp(RHO) z."""
FEW = 48


def nodes(count: int = FEW) -> tuple[Tensor, Tensor, Tensor]:
    """z, eps and weights of mean 1 for expectations over two independent normal numbers."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    z, eps = (torch.from_numpy(v.flatten()) for v in np.meshgrid(x, x))
    weights = torch.from_numpy(np.outer(w, w).flatten())
    return z, eps, weights / weights.mean()


def gradients(matching: Matching, t: float, *, rho: float = RHO, logits: bool = False) -> tuple[float, float, float]:
    """Loss and its gradients in the student's mean and log deviation; the critic is exact."""
    mu, log_std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, rho))
    z, eps, weights = (v.reshape(-1, 1, 1, 1, 1) for v in nodes())
    x0, times = mu + log_std.exp() * z, torch.full((len(z),), t, dtype=torch.float64)
    noised = Noised(x0, RF.add_noise(x0, eps, times), times, eps)
    loss = matching.loss(noised, scores(rho, logits=logits, count=len(z)), weights.flatten())
    loss.backward()
    assert mu.grad is not None
    assert log_std.grad is not None
    return loss.item(), float(mu.grad), float(log_std.grad)


def scores(rho: float = RHO, *, logits: bool = False, count: int) -> Scores:
    teacher, critic = GaussianTeacher(f64(0, MEAN), STD), GaussianTeacher(f64(0, MU), math.exp(rho))
    for network in (teacher, critic):
        network.requires_grad_(False)
    cond, none = (cond_of(c, count) for c in (1, 0))
    return Scores(teacher, critic, CFG(), cond, none, logits=ratio if logits else None)


def spreads(t: float, rho: float = RHO) -> tuple[float, float, float, float]:
    """a, s, and the variances of the noised teacher and student."""
    a, s = 1 - t, t
    return a, s, a * a * STD**2 + s * s, a * a * math.exp(2 * rho) + s * s


def log_normal(x: Tensor, mean: float, variance: float) -> Tensor:
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)


def ratio(x_t: Tensor, t: Tensor) -> Tensor:
    """The logits of a perfect discriminator, `[B, 1]`."""
    a, _, v_r, v_g = spreads(float(t[0]))
    return (log_normal(x_t, a * MEAN, v_r) - log_normal(x_t, a * MU, v_g)).flatten(1)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_exact_weight_gives_the_gradient_of_the_kl(t: float) -> None:
    a, _, v_r, v_g = spreads(t)
    _, mu, rho = gradients(ReverseKL(weight="exact"), t)
    assert mu == pytest.approx(a * a * (MU - MEAN) / v_r, rel=1e-9)
    assert rho == pytest.approx(a * a * math.exp(2 * RHO) * (1 / v_r - 1 / v_g), rel=1e-9)


def test_the_weight_one_is_diff_instruct() -> None:
    """`x . (fake - real)` with no gradient in the two: its public code's loss."""
    a, s, *_ = spreads(0.5)
    exact, one = gradients(ReverseKL(weight="exact"), 0.5)[1:], gradients(ReverseKL(weight="one"), 0.5)[1:]
    assert one == pytest.approx([g * s * s / a / a for g in exact], rel=1e-9)


def test_the_weight_by_distance_is_dmds() -> None:
    torch.manual_seed(0)
    x0 = torch.randn(4, 1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    t, eps = torch.full((4,), 0.5, dtype=torch.float64), torch.randn(4, 1, 2, 3, 3, dtype=torch.float64)
    noised, both = Noised(x0, RF.add_noise(x0, eps, t), t, eps), scores(count=4)
    (mine,) = torch.autograd.grad(ReverseKL().loss(noised, both), x0)
    with torch.no_grad():
        real, fake = both.real(noised.x_t, t), both.fake(noised.x_t, t)
    away = (x0 - real).abs().flatten(1).mean(1)
    torch.testing.assert_close(mine, (fake - real) / (away.reshape(-1, 1, 1, 1, 1) + targets.FLOOR) / x0.numel())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_with_an_exact_critic_is_one_minus_alpha_times_the_fisher_divergence(alpha: float) -> None:
    a, s, v_r, v_g = spreads(0.4)
    loss, *_ = gradients(Fisher(alpha=alpha, weight="one"), 0.4)
    z, eps, weights = nodes()
    x_t = a * (MU + math.exp(RHO) * z) + s * eps
    gap = s * s / a * (-(x_t - a * MEAN) / v_r + (x_t - a * MU) / v_g)  # real - fake: s^2 / a times that of the scores
    assert loss == pytest.approx((1 - alpha) * float((weights * gap**2).mean()), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sids_gradient_points_to_the_teacher_for_every_alpha(alpha: float) -> None:
    t, equal = 0.4, math.log(STD)
    _, s, v, _ = spreads(t, equal)
    mu = gradients(Fisher(alpha=alpha, weight="one"), t, rho=equal)[1]
    assert mu == pytest.approx((MU - MEAN) * s**4 / v**2, rel=1e-9)


class Told(Scores):
    """Scores that are fixed clips, and a little of x_t, so that they have a gradient."""

    def real(self, x_t: Tensor, t: Tensor) -> Tensor:
        return element("real", x_t) + 0.5 * x_t

    def fake(self, x_t: Tensor, t: Tensor) -> Tensor:
        return element("fake", x_t) - 0.25 * x_t


def element(name: str, like: Tensor) -> Tensor:
    return Rng(7).randn(like.shape, name).double()


def told(matching: Matching, keep: Tensor | None = None, logits: Any = None) -> tuple[Tensor, Tensor]:
    """Three clips, and the loss's gradient in them; x_t is the clip."""
    x0 = element("x0", torch.empty(3, 2, 4, 2, 2)).requires_grad_()
    none: Any = None
    scores = Told(none, none, CFG(), none, none, logits=logits)
    loss = matching.loss(Noised(x0, x0, torch.full((3,), 0.5, dtype=torch.float64), x0), scores, keep)
    return x0.detach(), torch.autograd.grad(loss, x0)[0]


def test_sids_default_weight_is_one_over_the_distance_of_clip_and_teacher() -> None:
    """A number per clip that is not followed: the gradient is that of weight one, so often."""
    x0, grad = told(Fisher(alpha=0.7))
    away = (x0 - element("real", x0) - 0.5 * x0).abs().flatten(1).mean(1) + targets.FLOOR
    torch.testing.assert_close(grad, told(Fisher(alpha=0.7, weight="one"))[1] / away.reshape(-1, 1, 1, 1, 1))


def test_sims_constant_is_per_element() -> None:
    """Where a clip's scores are about c apart: u = y / sqrt(mean y^2 + c^2) per element, followed through both networks."""
    x0 = element("x0", torch.empty(3, 2, 4, 2, 2)).requires_grad_()
    y = element("fake", x0) - 0.25 * x0 - element("real", x0) - 0.5 * x0
    u = y / (y.square().flatten(1).mean(1) + 1.3**2).sqrt().reshape(-1, 1, 1, 1, 1)
    (expected,) = torch.autograd.grad((-u * (element("fake", x0) - 1.25 * x0)).mean(), x0)
    torch.testing.assert_close(told(ScoreImplicit(c=1.3))[1], expected)


@pytest.mark.parametrize("frames", [1, 4])
def test_what_counts_more_counts_more_in_an_f_divergence_too(frames: int) -> None:
    """`keep` of clips or of frames, times the ratio's weight of the clip."""
    logits, keep = f64(-0.5, 0.2, 1.0)[:, None], 1 + element("keep", torch.empty(3, frames)).abs()
    matching = FDivergence(kind="forward_kl")
    expected = told(ReverseKL())[1] * (matching.weights(logits)[:, None] * keep).reshape(3, 1, frames, 1, 1)
    torch.testing.assert_close(told(matching, keep, lambda x_t, t: logits)[1], expected)


def test_motion_counts_besides_with_its_weight_and_what_counts() -> None:
    """On differences of frames, from the critic's towards the teacher's, by `keep`."""
    keep = f64(0.5, 2.0, 0.5)
    x0, t = element("clip", torch.empty(3, 2, 4, 2, 2)).requires_grad_(), torch.full((3,), 0.5, dtype=torch.float64)
    eps = element("noise", x0)
    noised, known = Noised(x0, RF.add_noise(x0, eps, t), t, eps), scores(count=3)
    with torch.no_grad():
        real, fake = known.real(noised.x_t, t), known.fake(noised.x_t, t)

    def grad(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x0, retain_graph=True)[0]

    whole, plain = (ReverseKL(motion=w).loss(noised, known, keep) for w in (0.2, 0.0))
    torch.testing.assert_close(grad(whole) - grad(plain), 0.2 * grad(motion_matching(x0, real, fake, keep)))


def test_the_ratio_is_that_of_the_mean_of_the_heads() -> None:
    """`r = exp(mean logit)`: neither a sum, which grows with the heads, nor a mean of ratios."""
    logits = f64(-0.5, 0.7, 0.3, -0.1, 1.0, 0.2).reshape(3, 2)
    r = f64(0.1, 0.1, 0.6).exp()
    torch.testing.assert_close(FDivergence(kind="forward_kl").weights(logits), r / r.mean())


def test_decoupled_guidance_has_noise_of_its_own() -> None:
    matching, size = ReverseKL(decoupled=True), (64, 2, 4, 4, 4)
    x0, t, rng = torch.zeros(size, dtype=torch.float64), torch.full((64,), 0.5, dtype=torch.float64), Rng(0)
    at = matching.noised(x0, RF, t, rng.randn(size, "eps").double(), torch.ones_like(t), rng).guided_at
    assert at is not None
    own = at.x_t / at.t.reshape(-1, 1, 1, 1, 1)
    assert abs(float((own * rng.randn(size, "eps").double()).mean())) < 0.05
    assert float(own.square().mean()) == pytest.approx(1, abs=0.05)


def test_sim_follows_the_distance_of_the_scores_with_the_samples_held() -> None:
    """d = y^2 / 2 in x0: its gradient in the student's own score, averaged over samples that do not move."""
    t = 0.4
    a, s, v_r, v_g = spreads(t)
    _, mu, rho = gradients(ScoreImplicit(distance="l2"), t)
    z, eps, weights = nodes()
    x_t = a * (MU + math.exp(RHO) * z) + s * eps
    away = x_t - a * MU
    y = -away / v_g + (x_t - a * MEAN) / v_r
    scale = (s * s / a) ** 2
    assert mu == pytest.approx(scale * float((weights * y * a / v_g).mean()), rel=1e-8)
    in_rho = away * 2 * a * a * math.exp(2 * RHO) / v_g**2  # of the score -away / v_g
    assert rho == pytest.approx(scale * float((weights * y * in_rho).mean()), rel=1e-8)


def test_sim_with_l2_is_sid_with_alpha_one() -> None:
    sim, sid = gradients(ScoreImplicit(distance="l2"), 0.6), gradients(Fisher(weight="one"), 0.6)
    assert sim == pytest.approx(sid, rel=1e-12)


def test_pseudo_huber_weighs_clips_alike() -> None:
    """A clip whose scores are ten times as far apart has as much gradient: far above c only the direction counts."""
    torch.manual_seed(0)
    shape = (1, 1, 2, 4, 4)
    direction, x0 = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    class Apart(Scores):
        far = 1.0

        def real(self, x_t: Tensor, t: Tensor) -> Tensor:
            return 0 * x_t

        def fake(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.far * direction + 0 * x_t

    sizes = []
    for Apart.far in (1.0, 10.0):
        leaf = x0.clone().requires_grad_()
        noised = Noised(leaf, leaf, torch.ones(1, dtype=torch.float64), leaf)
        none: Any = None
        loss = ScoreImplicit().loss(noised, Apart(none, none, CFG(), none, none))
        sizes.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-5, atol=0)
    unit = direction / direction.square().mean().sqrt()
    torch.testing.assert_close(sizes[0], unit / x0.numel(), rtol=1e-5, atol=0)


F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "hellinger": lambda r: 4 * (1 - r.sqrt()),
    "softened_rkl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "neyman": lambda r: (1 - r) ** 2 / r / 2,
}


@pytest.mark.parametrize("kind", F)
def test_an_f_divergence_has_its_own_gradient(kind: Any) -> None:
    """Against finite differences of `E_student f(teacher / student)` at one time."""
    t = 0.5
    a, _, v_r, _ = spreads(t)
    x = torch.linspace(-9, 9, 40001, dtype=torch.float64)

    def divergence(mu: float, rho: float) -> float:
        v_g = spreads(t, rho)[3]
        p, q = log_normal(x, a * MEAN, v_r), log_normal(x, a * mu, v_g)
        return float(torch.trapezoid(q.exp() * F[kind]((p - q).exp()), x))

    matching = FDivergence(kind=kind, weight="exact", low=1e-300, high=1e300)
    z, eps, _ = nodes()
    x_t = (a * (MU + math.exp(RHO) * z) + t * eps).reshape(-1, 1, 1, 1, 1)
    h = matching.h(ratio(x_t, torch.full((1,), t)).mean(1).exp())
    _, mu, rho = gradients(matching, t, logits=True)
    step = 1e-4
    in_mu = (divergence(MU + step, RHO) - divergence(MU - step, RHO)) / (2 * step)
    in_rho = (divergence(MU, RHO + step) - divergence(MU, RHO - step)) / (2 * step)
    assert mu * float(h.mean()) == pytest.approx(in_mu, rel=1e-4)  # h counts relative to its mean in the batch
    assert rho * float(h.mean()) == pytest.approx(in_rho, rel=1e-4, abs=1e-6)


def test_reverse_kl_as_an_f_divergence_is_dmd2_bit_for_bit() -> None:
    assert gradients(FDivergence(kind="reverse_kl"), 0.5, logits=True) == gradients(ReverseKL(), 0.5)


def test_ratios_are_limited() -> None:
    wide = torch.tensor([[-50.0, -50.0], [0.0, 0.0], [50.0, 50.0]])
    h = FDivergence(kind="forward_kl").weights(wide)
    torch.testing.assert_close(h, torch.tensor([0.1, 1.0, 20.0]) / 7.0333333)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="low must be below high"):
        FDivergence(low=2.0, high=1.0)
    with pytest.raises(ValueError, match="settings.batch at least 2"):
        FDivergence().weights(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="set its adversarial weight"):
        gradients(FDivergence(), 0.5)
    with pytest.raises(ValueError, match="alpha"):
        Fisher(alpha=-1.0)


@pytest.mark.parametrize("adversary", [
    None, Adversary(mismatched=True), Adversary(clean=True), Adversary(loss="hinge"), Adversary(loss="relativistic"),
    Adversary(density=Uniform(high=0.5)),
])  # fmt: skip
def test_a_discriminator_that_is_no_log_ratio_is_refused(adversary: Adversary | None) -> None:
    """Or that has learnt it at other times than those of the scores and of the critic."""
    with pytest.raises(ValueError, match="loss: softplus, density: null, neither clean nor mismatched"):
        DMD2(matching=FDivergence(), adversary=adversary)


def test_a_discriminator_may_draw_the_times_of_scores_or_critic_itself() -> None:
    for density in (DMD2().score_density, DMD2().critic_density):
        DMD2(matching=FDivergence(), adversary=Adversary(density=density, draws=2))
    DMD2(adversary=Adversary(density=Uniform(high=0.5), loss="hinge"))


def test_what_it_asks_the_discriminator_is_in_the_cost() -> None:
    asks, does_not = (
        DMD2(matching=matching, adversary=Adversary()).cost() for matching in (FDivergence(), ReverseKL())
    )
    assert sum(work.forwards for work in asks) == sum(work.forwards for work in does_not) + 1


def test_the_ratio_is_read_for_the_prompt_of_each_clip() -> None:
    asked: list[Cond] = []

    class Eyes(Asked):
        def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Any) -> list[Tensor]:
            asked.append(cond)
            return [x_t.flatten(1)[:, :1]]

    nets = Nets(
        {"teacher": Eyes(GaussianTeacher(f64(0, MEAN), STD)), "critic": Asked(GaussianTeacher(f64(0, MU), STD))}
    )
    nets = Nets({**nets, "discriminator": lambda seen: seen[0]})  # type: ignore[dict-item]
    shown = Batch(cond_of(1, 2), cond_of(0, 2), SCALAR)
    scores = DMD2(matching=FDivergence(), adversary=Adversary()).scores(nets, nets, shown)
    assert scores.logits is not None
    scores.logits(torch.zeros(2, *SCALAR, dtype=torch.float64), f64(0.5, 0.5))
    assert asked == [shown.cond]
