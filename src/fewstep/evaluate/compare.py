"""From measured clips to rows: distances, shares, intervals, and a student against its teacher at the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.evaluate.cost import Cost
from fewstep.evaluate.measure import Measured
from fewstep.evaluate.results import Gain, Range, Row, Truth
from fewstep.evaluate.sampling import Bench
from fewstep.evaluate.suite import Entry
from fewstep.metrics import bootstrap, frechet, ratio_of_means
from fewstep.metrics.statistics import clustered_wilson, ratio_bootstrap
from fewstep.world.grammar import ATTRIBUTES


def make_row(entry: Entry, mine: Measured, reference: Measured, target: Tensor, bench: Bench, cost: Cost) -> Row:
    """One row; `target` are the features that Frechet distances are taken to."""
    seeds, checked = bench.cases.seeds_per_prompt, mine.right is not None
    whole = mine.by_prompt("right", seeds) if checked else None
    each = dict(zip(ATTRIBUTES, mine.by_prompt("attributes", seeds).unbind(1), strict=True)) if checked else {}
    moved, reference_moved = mine.by_prompt("motion", seeds), reference.by_prompt("motion", seeds)
    return Row(
        name=entry.name,
        model=entry.model.card.name,
        role=entry.model.card.role,
        steps=entry.contract.steps,
        nfe=entry.contract.calls(),
        accuracy=None if whole is None else float(whole.mean()),
        accuracy_ci=None if whole is None else clustered_wilson(whole, seeds)[:],
        attributes={name: float(shares.mean()) for name, shares in each.items()} or None,
        attributes_ci={name: clustered_wilson(shares, seeds)[:] for name, shares in each.items()} or None,
        abstained=None if mine.abstained is None else float(mine.abstained.any(1).double().mean()),
        gain=None,
        frechet=None if target is mine.features else frechet(mine.features, target),
        frechet_n=len(mine.features),
        frechet_shuffled=frechet(mine.shuffled, target),
        motion=_ratio(mine.motion, reference.motion),
        motion_ci=_range(ratio_bootstrap(moved, reference_moved, _generator(bench))),
        motion_absolute=float(mine.motion.mean()),
        diversity=_ratio(mine.diversity, reference.diversity),
        diversity_absolute=None if mine.diversity is None else float(mine.diversity.mean()),
        flicker=_ratio(mine.flicker, reference.flicker),
        flicker_absolute=float(mine.flicker.mean()),
        seconds=cost.sampling.p50,
        seconds_p95=cost.sampling.p95,
        seconds_runs=len(cost.sampling.runs),
        seconds_decode=cost.decoding.p50,
        seconds_batched=mine.seconds,
        flops=cost.flops,
        memory_mb=cost.memory / 2**20,
    )


def make_truth(truth: Measured, reference: Measured, floor: float) -> Truth:
    """The renderer's own clips, measured like a model's."""
    if truth.right is None:
        raise ValueError("rendered clips are always checkable; these have no scores")
    return Truth(
        accuracy=float(truth.right.all(1).double().mean()),
        frechet=floor,
        motion=_ratio(truth.motion, reference.motion),
        diversity=_ratio(truth.diversity, reference.diversity),
        flicker=_ratio(truth.flicker, reference.flicker),
    )


def with_gains(rows: Sequence[Row], measured: Mapping[str, Measured], bench: Bench) -> tuple[Row, ...]:
    """Give every student row its distance to the teacher at the same number of steps, where that was measured."""
    baselines = {row.steps: row for row in rows if row.role == "teacher"}
    finished = []
    for row in rows:
        baseline = baselines.get(row.steps) if row.role == "student" else None
        gain = None if baseline is None else _gain(row, baseline, measured, bench)
        finished.append(replace(row, gain=gain))
    return tuple(finished)


def _gain(row: Row, baseline: Row, measured: Mapping[str, Measured], bench: Bench) -> Gain:
    mine, other, seeds = measured[row.name], measured[baseline.name], bench.cases.seeds_per_prompt
    accuracy, interval = None, None
    if mine.right is not None and other.right is not None:
        difference = mine.by_prompt("right", seeds) - other.by_prompt("right", seeds)
        accuracy, interval = float(difference.mean()), _range(bootstrap(difference, _generator(bench)))
    closer = None if row.frechet is None or baseline.frechet is None else row.frechet - baseline.frechet
    return Gain(baseline=baseline.name, accuracy=accuracy, accuracy_ci=interval, frechet=closer)


def _ratio(values: Tensor | None, reference: Tensor | None) -> float | None:
    """Relative to the reference; None where it is undefined (JSON knows no NaN)."""
    if values is None or reference is None:
        return None
    ratio = ratio_of_means(values, reference)
    return ratio if math.isfinite(ratio) else None


def _range(interval: tuple[float, float]) -> Range | None:
    return (interval[0], interval[1]) if all(map(math.isfinite, interval)) else None


def _generator(bench: Bench) -> torch.Generator:
    return torch.Generator().manual_seed(bench.suite.seed)
