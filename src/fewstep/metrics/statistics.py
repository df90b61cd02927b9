"""Intervals around measured numbers.

Few prompts tell little about the next one, and the intervals say so: they rest on Student's t, not on the normal
distribution, and there is none for a single prompt. How often they hold the truth is simulated in
`tests/test_coverage_slow.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST, ENOUGH = 2, 8
"""Prompts: below the first there is no interval; below the second it is wide and leans on how values are distributed."""


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


NOTHING = Interval(-math.inf, math.inf)
"""What one value says about the next."""


def wilson(right: float, total: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for `right` successes in `total` independent trials (Wilson 1927).

    `(p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)`. Sensible at 0 and at `total`, where the normal
    approximation has no width. No trials: [0, 1]. Trials that are not independent: `clustered_wilson`.
    """
    if not 0 <= right <= total:
        raise ValueError(f"right must lie in 0..{total}, got {right}")
    if total == 0:
        return Interval(0.0, 1.0)
    z = _normal_quantile(confidence)
    p, spread = right / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / total + spread / (4 * total)) / (1 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def clustered_wilson(shares: Tensor, size: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval where trials come in groups: `shares` `[G]` of right ones in each group of `size` trials.

    Trials of a group resemble each other, so they count for fewer. The design effect (Kish 1965) is the variance of the
    mean over groups, divided by what it would be if all trials were independent; the interval is that of
    `trials / effect * (z / t)^2` trials, the last factor because the effect is known from G groups only (Korn and Graubard
    1998; t of Student's distribution). Trials never count for fewer than groups, and count as groups where the effect
    cannot be estimated: if all or none are right. One group says nothing: [0, 1].
    """
    groups, p = len(shares), float(shares.double().mean())
    if groups < FEWEST:
        return Interval(0.0, 1.0)
    total = float(groups)
    if 0 < p < 1:
        effect = max(float(shares.double().var()) / (p * (1 - p) / size), 1.0)
        total = max(
            groups * size / effect * (_normal_quantile(confidence) / t_quantile(confidence, groups - 1)) ** 2, total
        )
    return wilson(min(p * total, total), total, confidence)


def mean_interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of `values` `[N]`. One value says nothing about the next: (-inf, inf).

    Clips of one prompt are not independent: average them first and give one value per prompt. For a difference between
    two models on the same prompts and seeds, give the paired differences.
    """
    x = values.detach().double().cpu()
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"an interval needs a non-empty vector, got shape {list(values.shape)}")
    if len(x) < FEWEST:
        return NOTHING
    half = t_quantile(confidence, len(x) - 1) * float(x.std()) / math.sqrt(len(x))
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def difference_of_shares(first: Tensor, second: Tensor, confidence: float = 0.95) -> Interval:
    """Interval of `mean(first - second)`, shares of right clips per prompt `[N]`, within [-1, 1]; of one prompt all of that.

    Student's t after two prompts are added, one won by each side (Bonett and Price 2012, on pairs of trials): without them
    the interval of a few prompts on which both sides happen to agree has no width at all.
    """
    differences = (first - second).double()
    if len(differences) < FEWEST:
        return Interval(-1.0, 1.0)
    low, high = mean_interval(torch.cat([differences, differences.new_tensor([1.0, -1.0])]), confidence)
    return Interval(max(low, -1.0), min(high, 1.0))


def jackknife(value: float, without: Tensor, confidence: float = 0.95) -> Interval:
    """Student's t interval around a statistic, from its values `[G]` with one group of the data after another left out.

    Standard error `sqrt((G - 1) / G sum_g (v_g - mean v)^2)` (Quenouille 1949, Tukey 1958). For statistics that are biased
    in small samples, where a bootstrap is worse still: its repeated rows make a Frechet distance larger. The interval is
    around what samples *of this size* give on average; it does not know the bias.
    """
    if without.ndim != 1 or len(without) < FEWEST:
        raise ValueError(f"a jackknife needs the values without each of 2 groups or more, got {list(without.shape)}")
    x = without.detach().double().cpu()
    error = math.sqrt((len(x) - 1) / len(x) * float((x - x.mean()).square().sum()))
    half = t_quantile(confidence, len(x) - 1) * error
    return Interval(value - half, value + half)


def ratio_of_means(values: Tensor, reference: Tensor) -> float:
    """`mean(values) / mean(reference)`; NaN when the reference mean is 0. The ratio of means, because a mean of ratios
    is ruled by the pairs with the smallest denominators."""
    bottom = float(reference.double().mean())
    return float(values.double().mean()) / bottom if bottom != 0 else math.nan


def ratio_interval(values: Tensor, reference: Tensor, confidence: float = 0.95) -> Interval:
    """Student's t interval of `ratio_of_means`, from the pairs `(values[i], reference[i])`.

    Around the ratio r, by the t interval of the mean of `values - r reference`, divided by the mean of `reference`
    (Cochran 1977, 6.4). NaN where the ratio is, (-inf, inf) with one pair.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values must have one shape, got {list(values.shape)} and {list(reference.shape)}")
    ratio, bottom = ratio_of_means(values, reference), float(reference.double().mean())
    if math.isnan(ratio):
        return Interval(math.nan, math.nan)
    low, high = mean_interval(values.double() - ratio * reference.double(), confidence)
    low, high = sorted((low / bottom, high / bottom))
    return Interval(ratio + low, ratio + high)


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0..100) with linear interpolation between ranks; ValueError for no values.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50)
    3.0
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    return float(torch.quantile(torch.tensor(list(values), dtype=torch.float64), q / 100))


@cache
def t_quantile(confidence: float, freedom: int) -> float:
    """t such that Student's t with so many degrees of freedom lies within +-t with this probability.

    >>> round(t_quantile(0.95, 7), 3)
    2.365
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence lies strictly between 0 and 1 and freedom >= 1, got {confidence} and {freedom}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd, total = freedom % 2, 0.0
    term = math.cos(angle) ** odd
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside


def _normal_quantile(confidence: float) -> float:
    """z such that a standard normal lies within +-z with this probability."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
