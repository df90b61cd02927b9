"""Confidence intervals of measured figures.

The intervals use Student's t, not the normal distribution, because few prompts say little about other prompts; a single prompt
has no interval. `tests/test_coverage_slow.py` simulates how often the intervals contain the true value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST, ENOUGH = 2, 8
"""Numbers of prompts. Below the first there is no interval; below the second it is wide and depends on the distribution."""


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


NOTHING = Interval(-math.inf, math.inf)
"""The interval from a single value."""


def wilson(right: float, total: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for `right` successes in `total` independent trials (Wilson 1927).

    `(p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)`. It is valid at 0 and at `total`, where the normal
    approximation has zero width. Without trials: [0, 1]. For trials that are not independent, use `clustered_wilson`.
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
    """Wilson's interval for trials in groups: `shares` `[G]` are the shares of successes in each group of `size` trials.

    Trials of one group resemble each other, so their effective number is smaller. The design effect (Kish 1965) is the variance
    of the mean over groups, divided by its value for independent trials. The interval is that of `trials / effect * (z / t)^2`
    trials; the last factor corrects for estimating the effect from G groups (Korn and Graubard 1998; t of Student's
    distribution). The effective number is at least the number of groups. It equals it if the effect cannot be estimated,
    because all or none are right. With one group: [0, 1].
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
    """Student's t interval of the mean of `values` `[N]`; (-inf, inf) for a single value.

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
    """Interval, within [-1, 1], of `mean(first - second)` for shares of right clips per prompt `[N]`; [-1, 1] for one prompt.

    Student's t after adding two prompts, one won by each side (Bonett and Price 2012, for pairs of trials). Without them, the
    interval would have zero width if both sides agree on all of a few prompts.
    """
    differences = (first - second).double()
    if len(differences) < FEWEST:
        return Interval(-1.0, 1.0)
    low, high = mean_interval(torch.cat([differences, differences.new_tensor([1.0, -1.0])]), confidence)
    return Interval(max(low, -1.0), min(high, 1.0))


def difference_interval(first: float, its: tuple[float, float], second: float, other: tuple[float, float]) -> Interval:
    """Interval of `first - second`, independent figures with intervals of their own (MOVER: Zou and Donner 2008).

    With Wilson's intervals it is that of two shares by Newcombe 1998, method 10. For paired values, `mean_interval` of their
    differences is narrower.
    """
    below = math.hypot(first - its[0], other[1] - second)
    above = math.hypot(its[1] - first, second - other[0])
    return Interval(first - second - below, first - second + above)


def jackknife(value: float, without: Tensor, confidence: float = 0.95) -> Interval:
    """Student's t interval around a statistic, from its values `[G]` without each group of the data in turn.

    Standard error `sqrt((G - 1) / G sum_g (v_g - mean v)^2)` (Quenouille 1949, Tukey 1958). Use it for statistics that are
    biased in small samples; a bootstrap is worse there, because repeated rows make a Frechet distance larger. The interval
    contains the mean for samples *of this size*; it does not include the bias.
    """
    if without.ndim != 1 or len(without) < FEWEST:
        raise ValueError(f"a jackknife needs at least 2 groups, one value without each, got {list(without.shape)}")
    x = without.detach().double().cpu()
    error = math.sqrt((len(x) - 1) / len(x) * float((x - x.mean()).square().sum()))
    half = t_quantile(confidence, len(x) - 1) * error
    return Interval(value - half, value + half)


def ratio_of_means(values: Tensor, reference: Tensor) -> float:
    """`mean(values) / mean(reference)`; NaN if the reference mean is 0. The mean of ratios is not used, because pairs with
    small denominators would dominate it."""
    bottom = float(reference.double().mean())
    return float(values.double().mean()) / bottom if bottom != 0 else math.nan


def ratio_interval(values: Tensor, reference: Tensor, confidence: float = 0.95) -> Interval:
    """Student's t interval of `ratio_of_means`, from the pairs `(values[i], reference[i])`.

    It is centred on the ratio r; its width is that of the t interval of the mean of `values - r reference`, divided by the mean
    of `reference` (Cochran 1977, 6.4). NaN if the ratio is NaN; (-inf, inf) with one pair.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values must have equal shapes, got {list(values.shape)} and {list(reference.shape)}")
    ratio, bottom = ratio_of_means(values, reference), float(reference.double().mean())
    if math.isnan(ratio):
        return Interval(math.nan, math.nan)
    low, high = mean_interval(values.double() - ratio * reference.double(), confidence)
    low, high = sorted((low / bottom, high / bottom))
    return Interval(ratio + low, ratio + high)


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of independent rows `[N, ...]`: its quantiles over resamples of N rows with replacement
    (Efron 1979). (-inf, inf) for a single row.

    `statistic` gets `[R, N, ...]` and returns one value per resample, `[R]`. Resamples without a value (NaN) are left out; if
    there is none with a value, both ends are NaN. For few rows the interval is too narrow.
    """
    x = values.detach().double().cpu()
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"a bootstrap needs rows [N >= 1, ...], got shape {list(values.shape)}")
    if len(x) < FEWEST:
        return NOTHING
    generator = torch.Generator().manual_seed(seed)
    found = statistic(x[torch.randint(len(x), (resamples, len(x)), generator=generator)])
    tail = (1 - confidence) / 2
    low, high = torch.nanquantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


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
    """The t for which Student's t with `freedom` degrees of freedom lies within +-t with probability `confidence`.

    >>> round(t_quantile(0.95, 7), 3)
    2.365
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(
            f"confidence must lie strictly between 0 and 1, and freedom must be at least 1; got {confidence} and {freedom}"
        )
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
    """The z for which a standard normal lies within +-z with probability `confidence`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
