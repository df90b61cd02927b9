"""Figures of long clips: curves over windows, slopes per 100 frames, and what is kept of the first window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics import bootstrap_interval, frechet, frechet_without, jackknife, mean_interval
from fewstep.metrics.statistics import FEWEST, Interval, clustered_wilson

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A measure's mean in a later window, over its mean in the first."""

    times: int
    """The window: the last one of a clip of so many times the models' own length."""
    ratio: float | None
    """None if the mean of the first window is 0."""
    interval: Range | None
    """95 % interval: percentile bootstrap over prompts (`kept`). None with a single prompt."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One measure over the windows of a row's clips."""

    values: tuple[float, ...]
    """Mean over clips, window by window."""
    intervals: tuple[Range | None, ...]
    """95 % intervals over prompts: Wilson's for shares, jackknife for distances, else Student's t. None with a single prompt."""
    slope: float | None
    """Drift: the change per 100 frames, by least squares. None for a row of one window."""
    slope_interval: Range | None
    """95 % interval over prompts: percentile bootstrap, for distances jackknife."""
    kept: tuple[Kept, ...] = ()


def curve(values: Tensor, seeds: int, frames: int, times: Sequence[int], *, share: bool) -> Curve:
    """The curve of a measure `[N, W]`: `seeds` clips of each prompt, windows of `frames` frames."""
    by_prompt = values.unflatten(0, (-1, seeds)).mean(1)
    several, windows = len(by_prompt) >= FEWEST, by_prompt.shape[1]
    slopes = slope(by_prompt, frames) if windows > 1 else None
    between = [clustered_wilson(w, seeds) if share else mean_interval(w) for w in by_prompt.unbind(1)]
    return Curve(
        values=tuple(by_prompt.mean(0).tolist()),
        intervals=tuple((i.low, i.high) if several else None for i in between),
        slope=None if slopes is None else float(slopes.mean()),
        slope_interval=None if slopes is None else _ends(bootstrap_interval(slopes, _mean)),
        kept=tuple(kept(by_prompt, n, share=share) for n in times if 1 < n <= windows),
    )


def kept(by_prompt: Tensor, times: int, *, share: bool = False) -> Kept:
    """What is kept of the first window in window `times`, from values `[P, W]`.

    The interval of a share is that of the prompts and two more, each right in one of the windows only (as in
    `statistics.difference_of_shares`). Without them it would have no width if all prompts are right in both.
    """
    pairs = by_prompt[:, [0, times - 1]]
    first, last = pairs.mean(0).tolist()
    if first == 0 or len(pairs) < FEWEST:
        return Kept(times=times, ratio=last / first if first else None, interval=None)
    rows = torch.cat([pairs, torch.eye(2, dtype=pairs.dtype)]) if share else pairs
    return Kept(times=times, ratio=last / first, interval=_ends(bootstrap_interval(rows, _ratio)))


def distances(mine: Tensor, real: Tensor, seeds: int, frames: int, times: Sequence[int]) -> Curve | None:
    """Frechet distances of features `[N, W, D]` to those of real clips in the same window; None for fewer than 4 clips."""
    if len(mine) < 4:
        return None
    windows = [(mine[:, w], real[:, w]) for w in range(mine.shape[1])]
    values = torch.tensor([frechet(a, b) for a, b in windows], dtype=torch.float64)
    groups = len(mine) // seeds
    without = None
    if groups >= FEWEST and len(mine) >= seeds + 2:
        without = torch.stack([frechet_without(a, b, seeds) for a, b in windows], 1)  # [P, W]
    slopes = slope(values[None], frames)[0] if len(values) > 1 else None
    ends = None
    if without is not None and slopes is not None:
        ends = _ends(jackknife(float(slopes), slope(without, frames)))
    between = [
        None if without is None else _ends(jackknife(float(value), without[:, w])) for w, value in enumerate(values)
    ]
    return Curve(
        values=tuple(values.tolist()),
        intervals=tuple(None if b is None else (max(0.0, b[0]), b[1]) for b in between),
        slope=None if slopes is None else float(slopes),
        slope_interval=ends,
        kept=tuple(
            Kept(times=n, ratio=float(values[n - 1] / values[0]) if values[0] > 0 else None, interval=None)
            for n in times if 1 < n <= len(values)
        ),
    )  # fmt: skip


def slope(values: Tensor, frames: int) -> Tensor:
    """Least-squares slope per 100 frames of series `[P, W]` over windows of `frames` frames: `[P]`, float64."""
    x = values.double()
    at = frames * torch.arange(x.shape[1], dtype=torch.float64) / 100
    at = at - at.mean()
    return x @ at / at.square().sum()


def ratio_to(mine: Tensor, reference: Tensor) -> tuple[float | None, Range | None]:
    """Ratio of means of values by prompt `[P]`, paired, with its bootstrap interval; None if the reference is 0."""
    pairs = torch.stack([reference, mine], 1)
    bottom, top = pairs.double().mean(0).tolist()
    return (top / bottom if bottom else None), _ends(bootstrap_interval(pairs, _ratio))


def _mean(resampled: Tensor) -> Tensor:
    return resampled.mean(1)


def _ratio(resampled: Tensor) -> Tensor:
    """Ratio of means of pairs `[R, P, 2]` (first, later); NaN where the first mean is 0."""
    first, later = resampled.mean(1).unbind(1)
    return torch.where(first == 0, torch.nan, later / first)


def _ends(interval: Interval) -> Range | None:
    """None for an interval that says nothing."""
    return (interval.low, interval.high) if all(map(math.isfinite, interval)) else None
