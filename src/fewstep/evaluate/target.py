"""The reference set of Frechet distances, and its controls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluate.compare import make_truth
from fewstep.evaluate.measure import Measured
from fewstep.evaluate.results import Truth
from fewstep.evaluate.sampling import Bench, sample_truth
from fewstep.metrics import frechet, split_half


@dataclass(frozen=True, kw_only=True)
class Target:
    """The features to which distances are measured, with their noise floor and the control with shuffled frames."""

    name: str
    features: Tensor
    """Features of the true clips, `[N, D]`."""
    floor: float
    """Distance of a second, independent set; with `halves`, distance between two halves of the only set."""
    halves: bool
    shuffled: float
    """Distance of true clips whose frames are in random order."""
    truth: Truth | None
    """The report's row of true clips."""


def make_target(bench: Bench, name: str, reference: Measured) -> Target:
    """Measure the true clips of a bench. If there are none, the clips of the reference row `name` are the target."""
    if bench.truth is None:
        return Target(
            name=f"the clips of {name}",
            features=reference.features,
            floor=_halves(reference.features, bench),
            halves=True,
            shuffled=frechet(reference.shuffled, reference.features),
            truth=None,
        )
    truth = bench.truth
    sets = [sample_truth(bench, truth, which) for which in range(truth.sets)]
    first, last, single = sets[0].features, sets[-1], len(sets) == 1
    floor = _halves(first, bench) if single else frechet(last.features, first)
    return Target(
        name=truth.name,
        features=first,
        floor=floor,
        halves=single,
        shuffled=frechet(last.shuffled, first),
        truth=make_truth(sets[truth.judged or 0], reference, None if single else floor, truth.kind),
    )


def _halves(features: Tensor, bench: Bench) -> float:
    return split_half(features, torch.Generator().manual_seed(bench.suite.seed))
