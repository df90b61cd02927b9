"""Losses have the gradients and values their docstrings state."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.core import Rng
from fewstep.diffusion import KINDS, Kind, Prediction, RectifiedFlow, Trig, target
from fewstep.methods import gan, targets
from fewstep.methods.motion import motion_matching
from support_gaussian import AffineTableStudent, ExactCritic, GaussianTeacher, cond_of, f64, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_toward_has_the_stated_gradient_and_value(dtype: torch.dtype) -> None:
    x = (100 * normal(6)).to(dtype).requires_grad_()
    g = (1e-6 * normal(6, "g")).to(dtype).requires_grad_()
    loss = targets.toward(x, g)
    loss.backward()
    assert g.grad is None
    g = g.detach()
    torch.testing.assert_close(x.grad, g / g.numel(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), g.square().mean() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", [RectifiedFlow(), Trig()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_distribution_matching_is_the_gradient_of_the_kl(path: RectifiedFlow | Trig, t: float) -> None:
    """Student mu + e^rho z, teacher N(m, v). Two-point quadrature is exact: the terms are quadratic in z and eps."""
    m, v, mu, rho = 0.7, 0.16, -0.3, math.log(0.9)
    teacher = GaussianTeacher(f64(0.0, m), v**0.5, path)
    student = AffineTableStudent((1.0,), path).fill([(math.exp(rho), mu)])
    z, eps = f64(1, 1, -1, -1).reshape(4, 1, 1, 1, 1), f64(1, -1, 1, -1).reshape(4, 1, 1, 1, 1)
    time, cond = torch.full((4,), t, dtype=torch.float64), cond_of(1, 4)
    x0 = student(z, torch.ones(4), cond).x0
    x_t = path.add_noise(x0.detach(), eps, time)
    c = path.coeffs(f64(t))
    real, fake = teacher(x_t, time, cond).x0, ExactCritic(student)(x_t, time, cond).x0
    targets.distribution_matching(x0, real, fake, weight=(c.a / c.s).square().expand(4)).backward()
    v_g, v_r = math.exp(2 * rho), c.a**2 * v + c.s**2
    torch.testing.assert_close(student.offset.grad, c.a**2 * (mu - m) / v_r, rtol=1e-10, atol=1e-12)
    by_rho = student.scale.grad * math.exp(rho)
    torch.testing.assert_close(by_rho, c.a**2 * v_g * (1 / v_r - 1 / (c.a**2 * v_g + c.s**2)), rtol=1e-10, atol=1e-12)


def test_distribution_matching_is_normalised_per_sample() -> None:
    """Scaling everything of one sample leaves its gradient unchanged; the default weight is `dmd_normaliser`."""
    x0, real, fake = (normal(3, n) for n in ("x", "r", "f"))
    scale = f64(1, 10, 100).reshape(3, 1, 1, 1, 1)
    grads = []
    for k in (torch.ones_like(scale), scale):
        x = (k * x0).requires_grad_()
        targets.distribution_matching(x, k * real, k * fake).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert targets.dmd_normaliser(x0, x0).max() == 1 / targets.FLOOR
    x, floor = x0.clone().requires_grad_(), 1e-5
    targets.distribution_matching(x, real, fake).backward()
    weight = 1 / ((x0 - real).abs().flatten(1).mean(1) + floor)  # of the teacher's prediction, not the critic's
    torch.testing.assert_close(x.grad, weight.reshape(3, 1, 1, 1, 1) * (fake - real) / x0.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_is_zero_at_the_truth_and_weighted_per_sample(kind: Kind) -> None:
    path, x0, eps, t = RectifiedFlow(), normal(2, "x0"), normal(2, "eps"), f64(0.3, 0.8)
    truth = Prediction(target(kind, x0, eps, t, path), kind, path.add_noise(x0, eps, t), t, path)
    assert targets.denoising(truth, x0, eps) == 0
    off = truth.with_raw(truth.raw + f64(1, 2).reshape(2, 1, 1, 1, 1))
    torch.testing.assert_close(targets.denoising(off, x0, eps, weight=f64(3, 0)), f64(1.5)[0])


def test_frames_with_times_of_their_own_are_normalised_one_by_one() -> None:
    x0, real, fake = torch.randn(3, 2, 4, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = targets.frame_normaliser(x0, real)
    assert frames.shape == (2, 5)
    for f in range(5):  # a clip of one frame is normalised alike by both
        alone = targets.dmd_normaliser(x0[:, :, f : f + 1], real[:, :, f : f + 1])
        torch.testing.assert_close(frames[:, f], alone)
    leaf = x0.clone().requires_grad_()
    targets.distribution_matching(leaf, real, fake, frames).backward()
    torch.testing.assert_close(leaf.grad, (fake - real) * frames[:, None, :, None, None] / x0.numel())


def test_pseudo_huber_limits() -> None:
    zero, x = torch.zeros(1, dtype=torch.float64), f64(2.0)
    torch.testing.assert_close(targets.pseudo_huber(x, zero, 0.0), f64(2.0)[0])
    torch.testing.assert_close(targets.pseudo_huber(x, zero, 1e4) * 2e4, targets.mse(x, zero), rtol=1e-6, atol=0)
    assert targets.pseudo_huber(x, x, 1e-3) == 0


def test_clips_and_frames_count_by_their_weights() -> None:
    a, b = (Rng(7).randn((2, 1, 3, 2, 2), name).double() for name in "ab")
    clip, frame = f64(0.5, 2.0), f64(0.5, 2.0, 1.0, 0.0, 3.0, 1.0).reshape(2, 3)
    for loss, each in (
        (targets.mse, (a - b).square()),
        (targets.pseudo_huber, ((a - b).square() + 1e-6).sqrt() - 1e-3),
    ):
        torch.testing.assert_close(loss(a, b, weight=clip), (clip.reshape(2, 1, 1, 1, 1) * each).mean())
        torch.testing.assert_close(loss(a, b, weight=frame), (frame.reshape(2, 1, 3, 1, 1) * each).mean())


def test_adversarial_terms() -> None:
    zero, right, wrong = torch.zeros(4, 2), torch.full((4, 2), 20.0), torch.full((4, 2), -20.0)
    assert math.isclose(float(gan.discriminator("softplus", zero, zero)), 2 * math.log(2), rel_tol=1e-6)
    assert gan.discriminator("softplus", right, wrong) < 1e-6 < gan.generator("softplus", wrong)
    assert gan.generator("softplus", right) < 1e-6
    a, b = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[-0.3, 0.2], [2.0, -1.0]])
    soft = lambda x: float((1 + x.double().exp()).log().mean())  # noqa: E731 - the mean over all logits
    assert float(gan.generator("softplus", a)) == pytest.approx(soft(-a))
    assert float(gan.discriminator("softplus", a, b)) == pytest.approx(soft(-a) + soft(b))
    assert float(gan.generator("hinge", a)) == pytest.approx(-2.5 / 4)
    assert float(gan.discriminator("hinge", a, b)) == pytest.approx((0 + 3 + 0.5 + 0) / 4 + (0.7 + 1.2 + 3 + 0) / 4)
    assert float(gan.generator("relativistic", a, b)) == pytest.approx(soft(b - a))
    assert float(gan.discriminator("relativistic", a, b)) == pytest.approx(soft(b - a))
    assert float(gan.discriminator("relativistic", a, a)) == pytest.approx(math.log(2))


def test_approximate_r1_is_the_squared_gradient() -> None:
    """For a linear D, `E (D(x) - D(x + rho n))^2 = rho^2 |grad D|^2`."""
    slope, n = f64(3.0, 4.0), torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = gan.approximate_r1(torch.zeros(1, dtype=torch.float64), 0.1 * n @ slope)
    assert math.isclose(float(value), 0.01 * 25, rel_tol=0.02)


def test_motion_matching_has_the_gradient_that_the_published_code_lacks() -> None:
    """Its gradient in the differences of frames is `w_j (fake - real)` over the mean error, and none in what all frames share."""
    generator = torch.Generator().manual_seed(3)
    x0, real, fake = (torch.randn(2, 3, 5, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_(True)
    (grad,) = torch.autograd.grad(motion_matching(x0, real, fake), x0)
    moved, wanted, seen = (x.detach().diff(dim=2) for x in (x0, real, fake))
    error = (moved - wanted).abs().mean((1, 3, 4))
    growth = 1.2 ** torch.arange(4)
    for clip in range(2):
        expected = torch.zeros(3, 5, 2, 2, dtype=torch.float64)
        for j in range(4):
            weight = 0.7 * (1 + error[clip, : j + 1].sum() / error[clip].sum()) + 0.3 * growth[j] / growth.mean()
            pull = weight * (seen - wanted)[clip, :, j] / error[clip].mean() / moved.numel()
            expected[:, j + 1] += pull
            expected[:, j] -= pull
        assert torch.allclose(grad[clip], expected, rtol=1e-4)
    assert torch.allclose(grad.sum(2), torch.zeros_like(grad.sum(2)), atol=1e-12)


def test_motion_of_the_past_does_not_count() -> None:
    """A clip with three frames of past has the gradient of the clip that begins at the last of them."""
    generator = torch.Generator().manual_seed(5)
    x0, real, fake = (torch.randn(2, 2, 7, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    keep = f64(0, 0, 0, 7 / 4, 7 / 4, 7 / 4, 7 / 4).expand(2, -1)
    whole, cut = x0.clone().requires_grad_(True), x0[:, :, 2:].clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(motion_matching(whole, real, fake, keep), whole)
    (expected,) = torch.autograd.grad(motion_matching(cut, real[:, :, 2:], fake[:, :, 2:]), cut)
    assert torch.allclose(grad[:, :, 2:], expected, rtol=1e-6)
    assert not grad[:, :, :2].any()


def test_motion_of_a_clip_counts_as_much_as_the_clip() -> None:
    generator = torch.Generator().manual_seed(6)
    x0, real, fake = (torch.randn(2, 2, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_(True)
    (grad,) = torch.autograd.grad(motion_matching(x0, real, fake), x0)
    for keep in (f64(0.5, 1.5), f64(0.5, 1.5)[:, None].expand(-1, 4)):
        (weighed,) = torch.autograd.grad(motion_matching(x0, real, fake, keep), x0)
        assert torch.allclose(weighed, grad * f64(0.5, 1.5).reshape(2, 1, 1, 1, 1), rtol=1e-4)


def test_motion_matching_moves_the_motion_towards_the_real_one() -> None:
    """Where the critic sees the student as it is."""
    generator = torch.Generator().manual_seed(4)
    x0, real = (torch.randn(1, 2, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x0.requires_grad_(True)
    (grad,) = torch.autograd.grad(motion_matching(x0, real, x0.detach()), x0)
    distances = [((x0 - step * grad).diff(dim=2) - real.diff(dim=2)).square().sum() for step in (0.0, 1.0)]
    assert distances[1] < distances[0]
    assert not torch.autograd.grad(motion_matching(x0, real, real), x0)[0].any()


def test_motion_without_error_or_weight_is_finite() -> None:
    x0, real, fake = (Rng(0).randn((2, 1, 4, 2, 2), name).double() for name in ("x0", "real", "fake"))
    x0.requires_grad_()
    for wanted, keep in (
        (x0.detach(), None),
        (real, f64(0.0, 2.0)),
        (real, torch.stack([f64(4, 0, 0, 0), f64(1, 1, 1, 1)])),
    ):
        (grad,) = torch.autograd.grad(motion_matching(x0, wanted, fake, keep), x0)
        assert grad.isfinite().all()
        assert keep is None or not grad[0].any(), "of a clip that does not count nothing moves"


def test_weights_of_clips_may_be_a_column() -> None:
    x0, real, fake = (Rng(0).randn((2, 1, 4, 2, 2), name).double() for name in ("x0", "real", "fake"))
    flat, column = (motion_matching(x0, real, fake, keep) for keep in (f64(0.5, 1.5), f64(0.5, 1.5)[:, None]))
    assert torch.equal(flat, column)
    with pytest.raises(ValueError, match="one latent frame have no motion to match; write motion: 0"):
        motion_matching(x0[:, :, :1], real[:, :, :1], fake[:, :, :1])
