"""Identities of paths, predictions, times, guidance; orders of convergence of the samplers. All in float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from fewstep.core import Call, Cond, Rng
from fewstep.diffusion import (
    CFG,
    EDM,
    KINDS,
    VP,
    Betas,
    Contract,
    Grid,
    Heun,
    Kind,
    LogitNormal,
    NoisePath,
    Prediction,
    RectifiedFlow,
    TimeDensity,
    Trig,
    Uniform,
    shifted,
    target,
    timestep,
    uniform_grid,
)  # fmt: skip
from support_gaussian import GaussianTeacher, cond_of, f64, normal

PATHS = [RectifiedFlow(), Trig(), VP(), EDM(), Betas(schedule="linear"), Betas(snr_shift=3.0, zero_snr=True)]
BOUNDED = PATHS[:3]
SHAPE = (3, 2, 4, 2, 2)
path_of = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def draw(name: str) -> torch.Tensor:
    return Rng(1).randn(SHAPE, name).double()


# --- paths ------------------------------------------------------------------------------------------------------------


@path_of
def test_derivatives_are_derivatives(path: NoisePath) -> None:
    t, h = torch.linspace(0.1003, 0.9003, 9, dtype=torch.float64), 1e-6  # between the points of a table
    low, high, here = path.coeffs(t - h), path.coeffs(t + h), path.coeffs(t)
    torch.testing.assert_close((high.a - low.a) / (2 * h), here.da, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((high.s - low.s) / (2 * h), here.ds, rtol=1e-6, atol=1e-6)


@path_of
def test_time_of_log_snr_inverts(path: NoisePath) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t, rtol=1e-10, atol=1e-10)


@path_of
def test_no_time_lies_outside_a_path(path: NoisePath) -> None:
    """Cleaner than its cleanest level is t = 0, noisier than its noisiest t = 1: also for what another path begins with."""
    for other in PATHS:
        ends = torch.cat([other.log_snr(f64(0.0, 1.0)), f64(60.0, -60.0)])
        assert path.time_of_log_snr(ends).min() >= 0 and path.time_of_log_snr(ends).max() <= 1, type(other).__name__
    assert path.time_of_log_snr(f64(60.0, -60.0)).tolist() == pytest.approx([0.0, 1.0], abs=1e-9)


TABLES = [
    (Betas(schedule="linear"), {"beta_schedule": "linear"}),
    (Betas(), {"beta_schedule": "scaled_linear"}),
    (Betas(zero_snr=True), {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
    (Betas(num_train_timesteps=50, beta_start=0.01, beta_end=0.2), {"beta_schedule": "scaled_linear"}),
]


@pytest.mark.parametrize(("path", "config"), TABLES)
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_tables_are_those_of_diffusers(path: Betas, config: dict[str, object], scheduler: str) -> None:
    """Off by one level, or linear taken for scaled linear, would be far outside."""
    total = path.num_train_timesteps
    sizes = {"num_train_timesteps": total, "beta_start": path.beta_start, "beta_end": path.beta_end}
    theirs = getattr(diffusers(), scheduler)(**sizes, **config).alphas_cumprod.double()
    c = path.coeffs((torch.arange(total, dtype=torch.float64) + 1) / total)
    torch.testing.assert_close(c.a**2, theirs, rtol=2e-5, atol=1e-7)  # theirs are products in float32
    torch.testing.assert_close(c.s**2, 1 - theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(c.a**2 + c.s**2, torch.ones_like(theirs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_are_those_of_cogvideox(zero: bool, shift: float) -> None:
    theirs = diffusers().CogVideoXDDIMScheduler(rescale_betas_zero_snr=zero, snr_shift_scale=shift).alphas_cumprod
    c = Betas(zero_snr=zero, snr_shift=shift).coeffs((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    torch.testing.assert_close(c.a**2, theirs, rtol=1e-10, atol=1e-14)


def test_a_table_ends_exactly_clean_and_starts_from_plain_noise() -> None:
    for path in (Betas(), Betas(zero_snr=True)):
        c = path.coeffs(f64(0.0, 1.0))
        assert c.a[0] == 1 and c.s[0] == 0 and c.da.isfinite().all() and c.ds.isfinite().all()
        assert path.log_snr(f64(0.0)) == math.inf and path.time_of_log_snr(f64(math.inf)) == 0
        assert torch.equal(path.prior(draw("eps")), draw("eps"))
    assert 0.004 < float(Betas().coeffs(f64(1.0)).a ** 2) < 0.005  # a little signal is left, and
    assert abs(float(Betas(zero_snr=True).coeffs(f64(1.0)).a)) < 1e-15  # here it is not
    assert Betas().time_of_log_snr(f64(-20.0)) == 1  # noisier than its last level
    with pytest.raises(ValueError, match="beta_start <= beta_end"):
        Betas(beta_start=0.1)


def test_two_tables_meet_at_equal_snr_and_not_at_equal_times() -> None:
    """The image and the video teacher of AVDM2: one timestep, two noise levels."""
    image, video, t = Betas(), Betas(schedule="linear"), torch.linspace(0.2, 0.98, 40, dtype=torch.float64)
    there = video.time_of_log_snr(image.log_snr(t))
    assert ((there - t).abs() > 0.01).sum() > 30
    torch.testing.assert_close(image.time_of_log_snr(video.log_snr(there)), t, rtol=1e-10, atol=1e-10)


def test_timesteps_are_whole_on_the_table_and_follow_t_between() -> None:
    k = torch.arange(1000)
    assert torch.equal(timestep(((k + 1) / 1000).float(), 1000), k.float())
    assert timestep(f64(0.0, 0.0005, 0.5004), 1000).tolist() == [0.0, 0.0, pytest.approx(499.4, abs=1e-4)]
    for t in (0.25, 0.2504):
        _, slope = torch.func.jvp(lambda t: timestep(t, 1000), (f64(t),), (f64(1.0),))
        assert float(slope) == 1000


def test_time_per_frame_acts_per_frame() -> None:
    x0, eps, t = draw("x0"), draw("eps"), Rng(0).rand((3, 4), "t")
    whole = RectifiedFlow().add_noise(x0, eps, t)
    for f in range(4):
        assert torch.equal(whole[:, :, f], RectifiedFlow().add_noise(x0, eps, t[:, f, None].expand(3, 4))[:, :, f])


def test_a_time_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B\] or \[B, F\]"):
        RectifiedFlow().add_noise(draw("x0"), draw("eps"), torch.zeros(3, 4, 2))


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@path_of
def test_kinds_round_trip(path: NoisePath, kind: Kind) -> None:
    x0, eps, t = draw("x0"), draw("eps"), f64(0.2, 0.5, 0.9)
    x_t = path.add_noise(x0, eps, t)
    prediction = Prediction(target(kind, x0, eps, t, path), kind, x_t, t, path)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(prediction.x0, x0, **close)
    torch.testing.assert_close(prediction.eps, eps, **close)
    for other in KINDS:
        torch.testing.assert_close(prediction.as_kind(other), target(other, x0, eps, t, path), **close)
    s = f64(0.1, 0.3, 0.3)
    torch.testing.assert_close(prediction.step_to(s), path.add_noise(x0, eps, s), **close)


@path_of
def test_v_and_flow_are_those_of_the_papers(path: NoisePath) -> None:
    """v = a eps - s x0 (2202.00512), flow = da x0 + ds eps: on rectified flow eps - x0 (2209.03003)."""
    x0, eps, t = draw("x0"), draw("eps"), f64(0.2, 0.5, 0.9)
    c = path.at(t, x0)
    torch.testing.assert_close(target("v", x0, eps, t, path), c.a * eps - c.s * x0)
    torch.testing.assert_close(target("flow", x0, eps, t, path), c.da * x0 + c.ds * eps)
    if isinstance(path, RectifiedFlow):
        torch.testing.assert_close(target("flow", x0, eps, t, path), eps - x0)
        torch.testing.assert_close(c.a.flatten(), 1 - t)


@path_of
def test_score_is_the_gradient_of_the_log_density(path: NoisePath) -> None:
    teacher = GaussianTeacher(f64(0.0, 0.7), 0.4, path)
    x, t = normal(5), torch.full((5,), 0.4, dtype=torch.float64)
    c = path.coeffs(f64(0.4))
    expected = -(x - c.a * 0.7) / (c.a**2 * 0.16 + c.s**2)
    torch.testing.assert_close(teacher(x, t, cond_of(1, 5)).score, expected, rtol=1e-8, atol=1e-8)


# --- times ------------------------------------------------------------------------------------------------------------


def moved(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ONE_SIGMA = 0.5 * (1 + math.erf(1 / 2**0.5))
"""The quantile of a standard normal at 1."""


@pytest.mark.parametrize(
    ("density", "quantile", "time"),
    [
        (Uniform(), 0.25, 0.25),
        (Uniform(low=0.2, high=0.6), 0.25, 0.3),
        (Uniform(low=0.2, high=0.6, shift=3.0), 0.25, moved(0.3, 3.0)),  # the interval is cut first, then shifted
        (LogitNormal(), ONE_SIGMA, sigmoid(1)),
        (LogitNormal(mean=-0.5), 0.5, sigmoid(-0.5)),
        (LogitNormal(mean=-0.5, std=2.0), ONE_SIGMA, sigmoid(1.5)),
        (LogitNormal(mean=-0.5, std=2.0, shift=3.0), ONE_SIGMA, moved(sigmoid(1.5), 3.0)),
    ],
)
def test_quantiles_of_the_densities(density: TimeDensity, quantile: float, time: float) -> None:
    torch.testing.assert_close(density.at_quantile(f64(quantile)), f64(time))


@pytest.mark.parametrize("density", [Uniform(low=0.1, high=0.6, shift=2.0), LogitNormal(mean=-0.5)])
def test_samples_fall_one_in_each_slice_of_the_quantiles(density: TimeDensity) -> None:
    t = density.sample(1000, Rng(0)).double().sort().values
    edges = density.at_quantile((torch.arange(1001, dtype=torch.float64) / 1000).clamp(1e-6, 1 - 1e-6))
    assert (t > edges[:-1] - 1e-6).all() and (t < edges[1:] + 1e-6).all()


def test_samples_are_dealt_in_random_order_and_lie_anywhere_in_their_slice() -> None:
    drawn = torch.stack([Uniform().sample(4, Rng(0, step)) for step in range(400)]).double()
    torch.testing.assert_close(drawn.mean(0), f64(0.5, 0.5, 0.5, 0.5), rtol=0, atol=0.05)  # each clip meets every time
    within = (4 * drawn).remainder(1)
    assert 0.27 < float(within.std()) < 0.31  # of a uniform number: 0.289
    here, there = (Uniform().sample(16, Rng(0, 0, place)) for place in (0, 1))
    assert not torch.equal(here.argsort(), there.argsort())


def test_frames_may_have_times_of_their_own() -> None:
    density = Uniform(low=0.2, high=0.8, shift=3.0)
    t = density.sample(500, Rng(0), frames=4)
    assert t.shape == (500, 4) and t.dtype == torch.float32
    u = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    for frame in range(4):  # each frame follows the density, and none follows another
        torch.testing.assert_close(t[:, frame].double().sort().values, density.at_quantile(u), atol=5e-2, rtol=0)
    assert (torch.corrcoef(t.T) - torch.eye(4)).abs().max() < 0.15
    whole = t.flatten().double().sort().values  # stratified over all of them
    torch.testing.assert_close(
        whole, density.at_quantile((torch.arange(2000) + 0.5).double() / 2000), atol=1e-3, rtol=0
    )
    assert torch.equal(density.sample(4, Rng(0)), density.sample(4, Rng(0), frames=1)[:, 0])


def test_a_grid_density_visits_each_time_equally() -> None:
    t = Grid(times=(1.0, 0.5, 0.25)).sample(300, Rng(0))
    assert [int((t == u).sum()) for u in (1.0, 0.5, 0.25)] == [100, 100, 100]


def test_grids_and_shift() -> None:
    assert uniform_grid(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert set(uniform_grid(2, 5.0)) <= set(uniform_grid(4, 5.0))
    t = f64(0.1, 0.6)
    torch.testing.assert_close(shifted(shifted(t, 3.0), 1 / 3.0), t)


def test_a_terminal_time_is_where_the_grid_ends() -> None:
    plain, stretched = uniform_grid(4, 2.0), uniform_grid(4, 2.0, terminal=0.1)
    assert stretched[0] == 1.0 and stretched[-1] == 0.0 and stretched[-2] == pytest.approx(0.1)
    shares = [(1 - s) / (1 - p) for p, s in zip(plain[1:-1], stretched[1:-1])]
    assert shares == pytest.approx([shares[0]] * 3)
    assert uniform_grid(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0)) and len(uniform_grid(7)) == 8


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_scale_one_is_the_conditional_network_in_one_pass() -> None:
    sizes: list[int] = []

    def net(x: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        sizes.append(len(x))
        return GaussianTeacher(f64(0.0, 1.0), 0.5)(x, t, cond)

    x, t = normal(2), f64(0.5, 0.5)
    off = CFG()(net, x, t, cond_of(1, 2), cond_of(0, 2))
    CFG(scale=3.0)(net, x, t, cond_of(1, 2), cond_of(0, 2))
    assert sizes == [2, 4]
    assert torch.equal(off.raw, GaussianTeacher(f64(0.0, 1.0), 0.5)(x, t, cond_of(1, 2)).raw)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_moves_the_mean(kind: Kind) -> None:
    """Guidance between Gaussians of equal variance is the Gaussian of the extrapolated mean, in every kind."""
    x, t = normal(4), torch.full((4,), 0.6, dtype=torch.float64)
    teacher = GaussianTeacher(f64(-0.2, 0.5), 0.4, kind=kind)
    guided = CFG(scale=2.5)(teacher, x, t, cond_of(1, 4), cond_of(0, 4))
    moved = GaussianTeacher(f64(0.0, teacher.guided_mean(2.5)), 0.4)(x, t, cond_of(1, 4))
    torch.testing.assert_close(guided.x0, moved.x0, rtol=1e-10, atol=1e-10)


def test_guidance_goes_by_the_time_of_each_frame() -> None:
    teacher, x = GaussianTeacher(f64(0.0, 1.0), 0.5), draw("x")
    t = torch.tensor([0.1, 0.5, 0.9, 0.2], dtype=torch.float64).expand(3, 4)
    guided = CFG(scale=3.0, low=0.3)(teacher, x, t, cond_of(1, 3), cond_of(0, 3))
    words, null = (teacher(x, t, cond_of(label, 3)).raw for label in (1, 0))
    expected = torch.where(torch.tensor([False, True, True, False])[:, None, None], null + 3 * (words - null), words)
    torch.testing.assert_close(guided.raw, expected)


def test_guidance_conventions_and_interval() -> None:
    assert CFG.from_offset(3.0) == CFG(scale=4.0)
    teacher, x, t = GaussianTeacher(f64(0.0, 1.0), 0.5), normal(2), f64(0.1, 0.5)
    guided = CFG(scale=3.0, low=0.3)(teacher, x, t, cond_of(1, 2), cond_of(0, 2)).raw
    plain = teacher(x, t, cond_of(1, 2)).raw
    torch.testing.assert_close(guided[0], plain[0])
    assert not torch.allclose(guided[1], plain[1])


def test_guidance_has_one_scale_inside_its_interval_and_another_outside() -> None:
    teacher, times = GaussianTeacher(f64(0.0, 1.0), 0.5), (0.1, 0.3, 0.5, 0.7, 0.9)
    x, t, cond, null = normal(5), f64(*times), cond_of(1, 5), cond_of(0, 5)
    plain, free = teacher(x, t, cond).raw, teacher(x, t, null).raw
    for outside in (1.0, 2.0):
        guidance = CFG(scale=3.0, low=0.3, high=0.7, outside=outside)
        scale = f64(outside, 3, 3, 3, outside).reshape(-1, 1, 1, 1, 1)
        torch.testing.assert_close(guidance(teacher, x, t, cond, null).raw, free + scale * (plain - free))
    assert CFG(outside=2.0).active and not CFG().active
    assert CFG(scale=3.0, high=0.7).rescaled(5.0) == CFG(scale=5.0, high=0.7)
    assert CFG(scale=3.0, high=0.7, outside=2.0).rescaled(5.0) == CFG(scale=5.0, high=0.7, outside=5.0)


def test_a_contract_counts_both_calls_of_guidance() -> None:
    assert Contract(steps=4).calls() == 4 and Contract(steps=4, guidance=CFG(scale=2.0)).calls() == 8
    assert Contract(steps=4, sampler=Heun(), guidance=CFG(outside=2.0)).calls() == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_keeps_both_ends_exactly(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    for shift in torch.linspace(0.1, 12, 500).tolist():
        assert shifted(ends, shift).tolist() == [0.0, 1.0]
    inside = torch.linspace(0, 1, 1001, dtype=dtype)
    assert torch.equal(shifted(inside, 1.0), inside)


def test_guidance_is_exact_in_float64() -> None:
    x, t = torch.ones(1, 1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)

    def net(x_t: torch.Tensor, t: torch.Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return Prediction(raw=torch.tensor([[1.0], [0.0]]).double(), kind="x0", x_t=x_t, t=t, path=RectifiedFlow())

    cond = cond_of(1, 1)
    assert float(CFG(scale=1.3)(net, x, t, cond, cond).raw) == 1.3  # not float32's 1.2999999523
