"""Turn measured clips into rows: distances, shares, intervals, and the gain over the teacher at the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.evaluate.cost import Cost
from fewstep.evaluate.measure import Measured
from fewstep.evaluate.results import Gain, Range, Row, Truth
from fewstep.evaluate.sampling import Bench
from fewstep.evaluate.suite import Entry
from fewstep.metrics import frechet, frechet_infinity, frechet_without, jackknife, mean_interval, ratio_of_means
from fewstep.metrics.statistics import FEWEST, clustered_wilson, difference_of_shares, ratio_interval
from fewstep.world.grammar import ATTRIBUTES

BLOCKS = 100
"""Largest number of groups in a jackknife. With more prompts, several are left out at once, to save time."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Frechet distance of one set of clips to the target."""

    value: float
    without: Tensor | None
    """Distances with one prompt, or one of about `BLOCKS` groups of prompts, left out at a time; None with a single prompt."""
    infinity: float | None
    """Distance extrapolated to infinitely many clips; None with fewer than two clips per feature."""
    shuffled: float
    """Distance of the same clips with their frames in random order."""

    @classmethod
    def measure(cls, mine: Measured, target: Tensor, bench: Bench) -> Distance:
        x, (clips, width) = mine.features, target.shape
        prompts = len(bench.cases.prompts)
        block = math.ceil(prompts / BLOCKS) * bench.cases.seeds_per_prompt
        return cls(
            value=frechet(x, target),
            without=frechet_without(x, target, block) if prompts > 1 else None,
            infinity=frechet_infinity(x, target, _generator(bench)) if clips >= 2 * width else None,
            shuffled=frechet(mine.shuffled, target),
        )

    @property
    def interval(self) -> Range | None:
        if self.without is None:
            return None
        low, high = jackknife(self.value, self.without)
        return _range((max(0.0, low), high))

    def minus(self, other: Distance) -> tuple[float, Range | None]:
        """The difference to another row's distance, and its interval."""
        value = self.value - other.value
        if self.without is None or other.without is None:
            return value, None
        return value, _range(jackknife(value, self.without - other.without))


def make_row(entry: Entry, mine: Measured, reference: Measured, distance: Distance, bench: Bench, cost: Cost) -> Row:
    """One row; motion, diversity and flicker are relative to `reference`."""
    seeds, checked = bench.cases.seeds_per_prompt, mine.right is not None
    whole = mine.by_prompt("right", seeds) if checked else None
    each = dict(zip(ATTRIBUTES, mine.by_prompt("attributes", seeds).unbind(1), strict=True)) if checked else {}
    fits = None if mine.clip_score is None else mine.by_prompt("clip_score", seeds)
    is_reference = bench.truth is None and mine is reference
    moved = None
    if mine.motion is not None:
        moved = ratio_interval(mine.by_prompt("motion", seeds), reference.by_prompt("motion", seeds))
    return Row(
        name=entry.name,
        model=entry.model.card.name,
        role=entry.model.card.role,
        steps=entry.contract.steps,
        nfe=entry.contract.calls(),
        accuracy=None if whole is None else float(whole.mean()),
        accuracy_ci=None if whole is None else _shares(whole, seeds),
        attributes={name: float(shares.mean()) for name, shares in each.items()} or None,
        attributes_ci={name: found for name, shares in each.items() if (found := _shares(shares, seeds))} or None,
        abstained=None if mine.abstained is None else float(mine.abstained.any(1).double().mean()),
        clip_score=None if fits is None else float(fits.mean()),
        clip_score_ci=None if fits is None else _range(mean_interval(fits)),
        gain=None,
        frechet=None if is_reference else distance.value,
        frechet_ci=None if is_reference else distance.interval,
        frechet_infinity=None if is_reference else distance.infinity,
        frechet_n=len(mine.features),
        frechet_shuffled=distance.shuffled,
        motion=_ratio(mine.motion, reference.motion),
        motion_ci=None if moved is None else _range(moved),
        motion_absolute=None if mine.motion is None else float(mine.motion.mean()),
        diversity=_ratio(mine.diversity, reference.diversity),
        diversity_absolute=None if mine.diversity is None else float(mine.diversity.mean()),
        flicker=_ratio(mine.flicker, reference.flicker),
        flicker_absolute=None if mine.flicker is None else float(mine.flicker.mean()),
        seconds=cost.sampling.p50,
        seconds_p95=cost.sampling.p95,
        seconds_runs=len(cost.sampling.runs),
        seconds_decode=cost.decoding.p50,
        seconds_batched=mine.seconds,
        flops=cost.flops,
        memory_mb=cost.memory / 2**20,
    )


def make_truth(truth: Measured, reference: Measured, floor: float | None, name: str) -> Truth:
    """The row of true clips (rendered or real), measured like a model's."""
    return Truth(
        name=name,
        accuracy=None if truth.right is None else float(truth.right.all(1).double().mean()),
        clip_score=None if truth.clip_score is None else float(truth.clip_score.double().mean()),
        frechet=floor,
        motion=_ratio(truth.motion, reference.motion),
        diversity=_ratio(truth.diversity, reference.diversity),
        flicker=_ratio(truth.flicker, reference.flicker),
    )


def with_gains(
    rows: Sequence[Row], measured: Mapping[str, Measured], distances: Mapping[str, Distance], bench: Bench
) -> tuple[Row, ...]:
    """Give every student row its gain over the teacher at the same number of steps, if that teacher was measured."""
    baselines = {row.steps: row for row in rows if row.role == "teacher"}
    finished = []
    for row in rows:
        baseline = baselines.get(row.steps) if row.role == "student" else None
        gain = None if baseline is None else _gain(row, baseline, measured, distances, bench)
        finished.append(replace(row, gain=gain))
    return tuple(finished)


def _gain(
    row: Row, baseline: Row, measured: Mapping[str, Measured], distances: Mapping[str, Distance], bench: Bench
) -> Gain:
    mine, other, comparable = measured[row.name], measured[baseline.name], None not in (row.frechet, baseline.frechet)
    accuracy, accuracy_ci = _difference("right", mine, other, bench)
    clip_score, clip_score_ci = _difference("clip_score", mine, other, bench)
    closer, closer_ci = distances[row.name].minus(distances[baseline.name]) if comparable else (None, None)
    return Gain(
        baseline=baseline.name,
        accuracy=accuracy,
        accuracy_ci=accuracy_ci,
        frechet=closer,
        frechet_ci=closer_ci,
        clip_score=clip_score,
        clip_score_ci=clip_score_ci,
    )


def _difference(name: str, mine: Measured, other: Measured, bench: Bench) -> tuple[float | None, Range | None]:
    """Mean difference of a score over prompts, and its interval; None for a score that was not measured."""
    if getattr(mine, name) is None or getattr(other, name) is None:
        return None, None
    seeds = bench.cases.seeds_per_prompt
    first, second = mine.by_prompt(name, seeds), other.by_prompt(name, seeds)
    found = difference_of_shares(first, second) if name == "right" else mean_interval(first - second)
    return float((first - second).mean()), _range(found) if len(first) >= FEWEST else None


def _ratio(values: Tensor | None, reference: Tensor | None) -> float | None:
    """Mean relative to the reference's mean; None if it is undefined, because JSON has no NaN."""
    if values is None or reference is None:
        return None
    ratio = ratio_of_means(values, reference)
    return ratio if math.isfinite(ratio) else None


def _shares(shares: Tensor, seeds: int) -> Range | None:
    """Interval of a share of right clips; None with a single prompt."""
    return clustered_wilson(shares, seeds)[:] if len(shares) >= FEWEST else None


def _range(interval: tuple[float, float]) -> Range | None:
    """The interval, or None if it is not finite."""
    return (interval[0], interval[1]) if all(map(math.isfinite, interval)) else None


def _generator(bench: Bench) -> torch.Generator:
    return torch.Generator().manual_seed(bench.suite.seed)
