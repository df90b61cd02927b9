"""Intervals around measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


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
    `trials / effect` trials. The effect is kept within 1 (independent) and `size` (a group is one trial), and is `size`
    where it cannot be estimated: with one group, or if all or none are right.
    """
    groups, p = len(shares), float(shares.double().mean())
    effect = float(size)
    if groups > 1 and 0 < p < 1:
        spread = float(shares.double().var()) / groups
        effect = min(max(spread / (p * (1 - p) / (groups * size)), 1.0), effect)
    total = groups * size / effect
    return wilson(min(p * total, total), total, confidence)


def bootstrap(values: Tensor, generator: torch.Generator, confidence: float = 0.95, resamples: int = 2000) -> Interval:
    """Percentile bootstrap interval of the mean of `values` `[N]` (Efron 1979).

    Clips of one prompt are not independent: average them first and give one value per prompt. For a difference between
    two models on the same prompts and seeds, give the paired differences.
    """
    means = _resampled(values, generator, resamples).mean(1)
    return _ends(means, confidence)


def jackknife(value: float, without: Tensor, confidence: float = 0.95) -> Interval:
    """Normal interval around a statistic, from its values `[G]` with one group of the data after another left out.

    Standard error `sqrt((G - 1) / G sum_g (v_g - mean v)^2)` (Quenouille 1949, Tukey 1958). For statistics that are biased
    in small samples, where a bootstrap is worse still: its repeated rows make a Frechet distance larger. The interval is
    around what samples *of this size* give on average; it does not know the bias.
    """
    if without.ndim != 1 or len(without) < 2:
        raise ValueError(f"a jackknife needs the values without each of 2 groups or more, got {list(without.shape)}")
    x = without.detach().double().cpu()
    error = math.sqrt((len(x) - 1) / len(x) * float((x - x.mean()).square().sum()))
    half = _normal_quantile(confidence) * error
    return Interval(value - half, value + half)


def ratio_of_means(values: Tensor, reference: Tensor) -> float:
    """`mean(values) / mean(reference)`; NaN when the reference mean is 0. The ratio of means, because a mean of ratios
    is ruled by the pairs with the smallest denominators."""
    bottom = float(reference.double().mean())
    return float(values.double().mean()) / bottom if bottom != 0 else math.nan


def ratio_bootstrap(
    values: Tensor, reference: Tensor, generator: torch.Generator, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of `ratio_of_means`, resampling the pairs `(values[i], reference[i])`."""
    if values.shape != reference.shape:
        raise ValueError(f"paired values must have one shape, got {list(values.shape)} and {list(reference.shape)}")
    both = torch.stack([values, reference], 1).double().cpu()
    index = torch.randint(len(both), (2000, len(both)), generator=generator)
    top, bottom = both[index].mean(1).unbind(1)
    return _ends(top / bottom, confidence) if bool((bottom != 0).all()) else Interval(math.nan, math.nan)


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0..100) with linear interpolation between ranks; ValueError for no values.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50)
    3.0
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    return float(torch.quantile(torch.tensor(list(values), dtype=torch.float64), q / 100))


def _resampled(values: Tensor, generator: torch.Generator, resamples: int) -> Tensor:
    x = values.detach().double().cpu()
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"bootstrap needs a non-empty vector, got shape {list(values.shape)}")
    return x[torch.randint(len(x), (resamples, len(x)), generator=generator)]


def _ends(draws: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def _normal_quantile(confidence: float) -> float:
    """z such that a standard normal lies within +-z with this probability."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
