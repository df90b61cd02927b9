"""Metrics against closed forms, known values, and clips whose answer is plain."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fewstep.metrics import (
    clustered_wilson,
    contrast,
    diversity,
    energy,
    flicker,
    frechet,
    frechet_infinity,
    frechet_without,
    gaussian_distance,
    jackknife,
    mean_interval,
    motion,
    percentile,
    pooled,
    ratio_of_means,
    saturation,
    shuffled,
    split_half,
    wilson,
)
from fewstep.metrics.statistics import difference_interval, difference_of_shares, ratio_interval, t_quantile
from fewstep.world.grammar import sample_scenes
from fewstep.world.renderer import Variation, render


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rendered(n: int, seed: int, num_frames: int = 16) -> torch.Tensor:
    scenes = sample_scenes(n, rng(7))
    return render(scenes, Variation.sample(n, rng(seed)), num_frames)


# --- Frechet ----------------------------------------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    """Diagonal covariances commute: |m|^2 + sum (sqrt a - sqrt b)^2."""
    mean_a, mean_b = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    var_a = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)  # one direction without any spread
    var_b = torch.tensor([9.0, 0.25, 2.0], dtype=torch.float64)
    expected = 5.25 + float((var_a.sqrt() - var_b.sqrt()).square().sum())
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng(), dtype=torch.float64)).Q
    cov_a, cov_b = (turn @ torch.diag(v) @ turn.T for v in (var_a, var_b))
    assert gaussian_distance(turn @ mean_a, cov_a, turn @ mean_b, cov_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    """2 x 2 matrices: tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    product = a @ b
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(product.det())))
    zero = torch.zeros(2, dtype=torch.float64)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace()) - 2 * cross, rel=1e-12)


@pytest.mark.parametrize("n", [5, 200])
def test_frechet_of_a_set_to_itself_is_zero_also_when_the_covariance_is_singular(n: int):
    x = torch.randn(n, 32, generator=rng(), dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x[torch.randperm(n, generator=rng())]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 9), (20, 6)])
def test_frechet_of_few_rows_takes_a_shorter_way_to_the_same_value(n: int, m: int):
    a, b = torch.randn(n, 12, generator=rng(1)).double(), 2 * torch.randn(m, 12, generator=rng(2)).double() + 1
    whole = gaussian_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert frechet(a, b) == pytest.approx(whole, rel=1e-6)
    assert frechet(a[torch.randperm(n, generator=rng())], b) == pytest.approx(whole, rel=1e-6)


def test_covariances_are_unbiased():
    """Two sets of few rows, far more than features: `|m|^2 + sum (sqrt a - sqrt b)^2` in one dimension."""
    a, b = torch.tensor([[0.0], [1.0], [5.0]]).double(), torch.tensor([[2.0], [2.5], [4.0], [9.0]]).double()
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_samples_approaches_that_of_their_gaussians():
    a, b = torch.randn(20_000, 3, generator=rng(1)), 2 * torch.randn(20_000, 3, generator=rng(2)) + 1
    assert frechet(a, b) == pytest.approx(3 + 3, rel=0.03)  # |m|^2 + sum (2 - 1)^2


def test_frechet_without_one_prompt_after_another():
    a, b = torch.randn(6, 4, generator=rng(1)), torch.randn(6, 4, generator=rng(2))
    left = frechet_without(a, b, 2)
    assert left.tolist() == pytest.approx(
        [frechet(a[2:], b[2:]), frechet(a[[0, 1, 4, 5]], b[[0, 1, 4, 5]]), frechet(a[:4], b[:4])]
    )
    assert frechet_without(a, b, 4).tolist() == pytest.approx([frechet(a[4:], b[4:]), frechet(a[:4], b[:4])])
    for other, size in ((b[:4], 2), (b, 5)):
        with pytest.raises(ValueError, match="sets of equal shape"):
            frechet_without(a, other, size)


def test_the_extrapolation_has_no_bias_where_it_is_given():
    a, b = torch.randn(400, 40, generator=rng(1)), 1.2 * torch.randn(400, 40, generator=rng(2)) + 0.3
    true = 40 * (0.3**2 + 0.2**2)
    assert frechet(a, b) > 1.5 * true
    assert frechet_infinity(a, b, rng()) == pytest.approx(true, rel=0.15)
    with pytest.raises(ValueError, match="N >= 2 D"):
        frechet_infinity(a[:79], b[:79], rng())


@pytest.mark.parametrize("width", [4, 60])  # more clips than features, and fewer
def test_the_jackknife_of_a_distance_covers_what_samples_of_that_size_give(width: int):
    generator, drawn = rng(3), []
    for _ in range(100):
        a, b = torch.randn(30, width, generator=generator), 1.5 * torch.randn(30, width, generator=generator) + 0.3
        drawn.append((frechet(a, b), jackknife(frechet(a, b), frechet_without(a, b))))
    mean = sum(value for value, _ in drawn) / len(drawn)
    hits = sum(low <= mean <= high for _, (low, high) in drawn)
    assert hits >= 90
    spread = torch.tensor([value for value, _ in drawn]).std()
    mean_width = sum(high - low for _, (low, high) in drawn) / len(drawn)
    assert mean_width < 2 * (2 * 1.96 * spread)  # and is not much wider than it must be


def test_frechet_is_symmetric_and_sees_a_shift():
    a, b = torch.randn(50, 4, generator=rng(1)), torch.randn(40, 4, generator=rng(2)) + 1
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, a + 3) == pytest.approx(36, rel=1e-5)


def test_frechet_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="N >= 2"):
        frechet(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="widths 3 and 4"):
        frechet(torch.rand(4, 3), torch.rand(4, 4))
    with pytest.raises(ValueError, match="NaN"):
        frechet(torch.full((4, 3), math.nan), torch.rand(4, 3))


def test_the_noise_floor_falls_with_the_number_of_clips():
    x = torch.randn(400, 8, generator=rng())
    assert 0 < split_half(x, rng()) < split_half(x[:60], rng())


def test_the_noise_floor_compares_halves_that_share_no_clip():
    """Two pairs of equal rows far apart: halves without a common row differ, however the rows are dealt."""
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    dealt = [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
    possible = {round(frechet(x[a], x[b]), 6) for a, b in dealt}
    for seed in range(20):
        assert round(split_half(x, rng(seed), repeats=1), 6) in possible


def test_the_noise_floor_is_the_mean_over_random_halves_that_share_no_row(monkeypatch: pytest.MonkeyPatch):
    x, seen = torch.arange(10.0)[:, None], []

    def noted(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append((set(a.flatten().tolist()), set(b.flatten().tolist())))
        return float(len(seen))

    monkeypatch.setattr(sys.modules[split_half.__module__], "frechet", noted)
    assert split_half(x, rng(3), repeats=4) == 2.5
    assert all(len(a) == len(b) == 5 and not a & b for a, b in seen)
    assert len({frozenset(a) for a, _ in seen}) == 4


def test_every_clip_is_shuffled_in_an_order_of_its_own():
    numbered = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(6, 3, 8, 2, 2)
    mixed = shuffled(numbered, rng())
    orders = {tuple(clip[0, :, 0, 0].tolist()) for clip in mixed}
    assert len(orders) == 6 and all(sorted(order) == list(range(8)) for order in orders)
    assert torch.equal(mixed, mixed[:, :1, :, :1, :1].expand_as(mixed)), "all pixels of a frame go together"


def test_shuffling_keeps_every_frame_and_loses_the_order():
    clips = rendered(6, 1)
    mixed = shuffled(clips, rng())
    for clip, other in zip(clips, mixed):
        frames = {f.numpy().tobytes() for f in clip.unbind(1)}
        assert {f.numpy().tobytes() for f in other.unbind(1)} == frames
    assert not torch.equal(clips, mixed)
    assert torch.equal(mixed, shuffled(clips, rng()))


def test_the_distance_sees_time():
    a, b = pooled(rendered(96, 1)), rendered(96, 2)
    floor = frechet(pooled(b), a)
    assert frechet(pooled(shuffled(b, rng())), a) > 10 * floor
    assert frechet(pooled(b[:, :, :1].expand_as(b)), a) > 5 * floor  # still images


# --- motion, flicker, diversity ---------------------------------------------------------------------------------------


def test_still_clips_neither_move_nor_flicker():
    still = torch.rand(2, 3, 1, 8, 8).expand(-1, -1, 6, -1, -1)
    assert motion(still).tolist() == [0, 0]
    assert flicker(still).tolist() == [0, 0]


def test_motion_and_flicker_of_known_signals():
    time = torch.arange(8.0)
    ramp = (0.1 * time).reshape(1, 1, 8, 1, 1).expand(1, 3, 8, 4, 4)
    blink = (0.5 * (-1) ** time).reshape(1, 1, 8, 1, 1).expand(1, 3, 8, 4, 4)
    assert motion(ramp).item() == pytest.approx(0.1)
    assert flicker(ramp).item() == pytest.approx(0, abs=1e-6)
    assert motion(blink).item() == pytest.approx(1)
    assert flicker(blink).item() == pytest.approx(2)  # |0.5 + 2 * 0.5 + 0.5|


def test_faster_scenes_have_more_motion_and_noise_flickers():
    scenes = sample_scenes(16, rng(3))
    variation = Variation.sample(16, rng(4))
    slow, quick = (render([_at(s, pace) for s in scenes], variation) for pace in ("slowly", "quickly"))
    assert ratio_of_means(motion(quick), motion(slow)) > 1.5
    assert flicker(slow + 0.05 * torch.randn(slow.shape, generator=rng())).mean() > 2 * flicker(slow).mean()


def _at(scene, pace: str):
    return type(scene)(**{**vars(scene), "speed": pace})


def test_diversity():
    one = torch.rand(3, 1, 3, 4, 8, 8, generator=rng())
    assert diversity(one.expand(-1, 4, *one.shape[2:])).tolist() == [0, 0, 0]
    apart = torch.stack([torch.zeros(2, 10), torch.full((2, 10), 3.0)], 1)
    assert diversity(apart).tolist() == [3, 3]
    three = torch.tensor([[[0.0], [1.0], [3.0]]])
    assert diversity(three).tolist() == pytest.approx([2.0])  # (1 + 2 + 3) / 3
    with pytest.raises(ValueError, match="2 seeds"):
        diversity(one)


@pytest.mark.parametrize(("function", "frames"), [(motion, 1), (flicker, 2), (pooled, 2)])
def test_too_few_frames_are_refused(function, frames: int):
    with pytest.raises(ValueError, match="F >= "):
        function(torch.zeros(1, 3, frames, 8, 8))


def test_pooled_features_are_a_fixed_number():
    assert pooled(torch.rand(2, 3, 3, 8, 8)).shape == pooled(torch.rand(2, 3, 20, 16, 24)).shape == (2, 72)


def test_pooled_features_of_a_picture_are_the_means_of_its_quarters():
    picture = torch.zeros(1, 3, 1, 4, 4)
    picture[:, 2, :, 2:, :2] = 0.8  # blue, lower left
    assert pooled(picture).tolist() == [pytest.approx([0.0] * 10 + [0.8, 0.0])]


def test_pooled_features_are_means_and_changes_by_part():
    """Quarter by quarter: the mean of either half of the clip, then four times the mean changes, without their sign."""
    frames = torch.zeros(1, 3, 6, 4, 4)
    frames[:, 0, 3:, :2, :2] = 0.5  # red, the second half, upper left
    frames[:, 1, 0::2, 2:, 2:] = -0.25  # green, every other frame, lower right
    made = pooled(frames)[0]
    means, (one, two, four, second) = made[:24].reshape(3, 2, 2, 2), made[24:].reshape(4, 3, 2, 2)
    assert means[0, :, 0, 0].tolist() == [0, 0.5] and means[0].sum() == 0.5
    assert means[1, :, 1, 1].tolist() == pytest.approx([-1 / 6, -1 / 12])
    assert one[0, 0, 0].item() == pytest.approx(4 * 0.5 / 5) and one[1, 1, 1].item() == pytest.approx(4 * 0.25)
    assert two[1, 1, 1] == 0 and two[0, 0, 0].item() == pytest.approx(4 * 0.5 * 2 / 4)
    assert four[0, 0, 0].item() == pytest.approx(4 * 0.5) and second[1, 1, 1].item() == pytest.approx(4 * 0.5)


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_known_values(right: int, total: int, low: float, high: float):
    """The last line is the example of Newcombe (1998), table I, method 3."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_trials_says_nothing():
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        wilson(5, 4)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (8, 2.306), (30, 2.042), (100, 1.984)]
)
def test_quantiles_of_students_t(freedom: int, value: float):
    """Student's own table, two-sided 0.95."""
    assert t_quantile(0.95, freedom) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.99, 5) == pytest.approx(4.032, abs=5e-4)
    assert t_quantile(0.95, 9999) == pytest.approx(1.960201, abs=1e-6)  # close to the normal one
    with pytest.raises(ValueError, match="freedom must be at least 1"):
        t_quantile(0.95, 0)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_interval_where_there_are_many():
    x = torch.randn(400, generator=rng(), dtype=torch.float64) * 2 + 5
    low, high = mean_interval(x)
    assert (low + high) / 2 == pytest.approx(float(x.mean()))
    assert high - low == pytest.approx(2 * 1.966 * float(x.std()) / 20, rel=1e-3)
    assert mean_interval(torch.full((7,), 3.0)) == (3, 3)
    few = torch.tensor([1.0, 3.0])
    assert mean_interval(few) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


def test_one_prompt_has_no_interval():
    one = torch.tensor([0.5])
    assert mean_interval(one) == ratio_interval(one, one + 1) == (-math.inf, math.inf)
    assert clustered_wilson(one, 4) == (0, 1)
    assert difference_of_shares(one, one) == (-1, 1)
    with pytest.raises(ValueError, match="non-empty"):
        mean_interval(torch.zeros(0))


def test_prompts_that_agree_by_chance_do_not_prove_that_nothing_differs():
    right = torch.ones(4, dtype=torch.float64)
    low, high = difference_of_shares(right, right)
    assert low < -0.5 and high > 0.5
    low, high = difference_of_shares(torch.ones(64), torch.zeros(64))
    assert 0.85 < low < high == 1.0


def test_the_interval_of_a_ratio_is_narrow_when_the_pairs_agree():
    base = torch.rand(50, generator=rng(), dtype=torch.float64) + 0.1
    assert ratio_interval(2 * base, base) == pytest.approx((2, 2))
    assert math.isnan(ratio_interval(base, torch.zeros(50)).low)
    below = -base - 0.1 * torch.rand(50, generator=rng(1), dtype=torch.float64)
    low, high = ratio_interval(base, below)
    assert low < ratio_of_means(base, below) < high  # of negative numbers too, low end first


def test_a_ratio_of_means_is_not_ruled_by_the_smallest_denominator():
    values, reference = torch.tensor([1.0, 3.0]), torch.tensor([0.01, 3.99])
    assert ratio_of_means(values, reference) == pytest.approx(1.0)  # the mean of the ratios is 50


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(50, generator=rng(), dtype=torch.float64)
    without = (x.sum() - x) / 49
    low, high = jackknife(float(x.mean()), without)
    assert (low + high) / 2 == pytest.approx(float(x.mean()))
    assert high - low == pytest.approx(2 * 2.0095752 * float(x.std()) / 50**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="2 groups"):
        jackknife(1.0, without[:1])


def test_the_jackknife_is_around_the_value_and_as_wide_as_the_others_differ_among_themselves():
    """Values without a group are biased; neither the centre nor the width may take that bias over."""
    without = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    low, high = jackknife(2.0, without)
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.302653 * (2 / 3 * 2) ** 0.5, rel=1e-6)
    assert jackknife(2.0, without + 7) == pytest.approx((low, high))


def test_ratios_are_of_means():
    values, reference = torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0])
    assert ratio_of_means(values, reference) == 2.5  # the mean of ratios is 2
    assert math.isnan(ratio_of_means(values, torch.zeros(2)))
    many = torch.rand(300, generator=rng(), dtype=torch.float64) + 0.1
    noisy = 3 * many * (1 + 0.2 * torch.randn(300, generator=rng(1), dtype=torch.float64))
    low, high = ratio_interval(noisy, many)
    assert 2.88 < low < ratio_of_means(noisy, many) < high < 3.12  # numerator and denominator vary together
    half = (
        t_quantile(0.95, 299)
        * float((noisy - ratio_of_means(noisy, many) * many).std())
        / 300**0.5
        / float(many.mean())
    )
    assert high - low == pytest.approx(2 * half, rel=1e-5)


def test_percentile():
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_clustered_wilson_counts_what_the_trials_are_worth() -> None:
    shares = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
    assert clustered_wilson(shares, 1) == wilson(6, 8)
    assert clustered_wilson(shares, 4) == pytest.approx(wilson(6, 8))  # every group agrees with itself: one trial each
    known = (1.959964 / 2.364624) ** 2  # the effect is estimated from 8 groups
    calm = clustered_wilson(torch.full((8,), 0.5), 2)  # less spread than independent trials: no bonus
    assert calm == pytest.approx(wilson(8 * known, 16 * known), rel=1e-5)
    assert clustered_wilson(torch.ones(8), 2) == wilson(8, 8)  # nothing to estimate the effect from


def test_the_design_effect_is_of_the_unbiased_variance() -> None:
    shares = torch.tensor([0.25, 0.5, 0.5, 0.75, 1.0, 0.5], dtype=torch.float64)
    p, variance = float(shares.mean()), float(((shares - shares.mean()) ** 2).sum()) / 5
    worth = 24 / (variance / 6 / (p * (1 - p) / 24)) * (1.959964 / 2.570582) ** 2
    assert 6 < worth < 24
    assert clustered_wilson(shares, 4) == pytest.approx(wilson(p * worth, worth), rel=1e-5)


def test_trials_never_count_for_fewer_than_their_groups() -> None:
    shares = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # they vary more than four trials do
    assert clustered_wilson(shares, 3) == pytest.approx(wilson(2, 4))


def test_clustered_wilson_covers_the_truth_and_plain_wilson_does_not() -> None:
    generator, groups, size = torch.Generator().manual_seed(0), 64, 2
    hits, plain = 0, 0
    for _ in range(1000):
        chance = (torch.rand(groups, generator=generator) < 0.6).double() * 0.9 + 0.05  # prompts are easy or hard
        right = (torch.rand(groups, size, generator=generator) < chance[:, None]).double()
        low, high = clustered_wilson(right.mean(1), size)
        hits += low <= 0.59 <= high
        low, high = wilson(int(right.sum()), groups * size)
        plain += low <= 0.59 <= high
    assert hits / 1000 > 0.93 > 0.88 > plain / 1000


# --- energy, colour ---------------------------------------------------------------------------------------------------


def test_energy_is_zero_for_equal_distributions_and_grows_with_their_distance() -> None:
    a, b = torch.randn(4000, 2, 8, generator=rng(1)), torch.randn(4000, 2, 8, generator=rng(2))
    assert torch.equal(energy(a, a), torch.zeros(4000, dtype=torch.float64))
    near, mid, far = (float(energy(a, b + shift).mean()) for shift in (0.0, 0.5, 2.0))
    assert abs(near) < 0.05 < mid < far
    shared = float(energy(a, a + 0.5).mean())  # clips that share their noise: no bias from equal pairs
    assert shared == pytest.approx(mid, rel=0.1)
    assert float(energy(a, b.roll(1, 0)).mean()) == pytest.approx(near, abs=0.05)
    with pytest.raises(ValueError, match="S >= 2"):
        energy(a[:, :1], b[:, :1])


def test_energy_sees_the_right_clip_for_the_wrong_prompt() -> None:
    prompts = 10 * torch.randn(50, 1, 8, generator=rng(1))
    a, b = (prompts + torch.randn(50, 2, 8, generator=rng(seed)) for seed in (2, 3))
    assert float(energy(a, b).mean()) < 0.5 < 10 < float(energy(a, b.roll(1, 0)).mean())


def test_saturation_and_contrast() -> None:
    red, grey = torch.full((1, 3, 2, 4, 4), -1.0), torch.zeros(1, 3, 2, 4, 4)
    red[:, 0] = 1
    assert float(saturation(red)) == 1 and float(saturation(grey)) == 0 == float(contrast(grey))
    halves = grey.clone()
    halves[..., :2], halves[..., 2:] = -1, 1
    assert float(contrast(halves)) == pytest.approx((16 / 15) ** 0.5) and float(saturation(halves)) == 0
    split = grey.clone()
    split[:, 2, :, :, :2], split[:, 2, :, :, 2:] = -1, 1  # blue weighs 0.114
    assert float(contrast(split)) == pytest.approx(0.114 * (16 / 15) ** 0.5)
    assert float(saturation(split)) == pytest.approx(0.5)
    blink = grey.clone()
    blink[:, :, 1] = 1
    assert float(contrast(blink)) == 0, "within a frame, not between them"
    for metric in (saturation, contrast):
        with pytest.raises(ValueError, match=r"\[B, 3, F, H, W\]"):
            metric(torch.zeros(1, 4, 2, 4, 4))


def test_an_interval_of_a_difference_is_that_of_independent_shares() -> None:
    """Newcombe 1998, table II: 56 of 70 less 48 of 80, method 10."""
    one, other = (56 / 70, wilson(56, 70)), (48 / 80, wilson(48, 80))
    assert difference_interval(*one, *other) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(*other, *one) == pytest.approx((-0.3339, -0.0524), abs=1e-4)
