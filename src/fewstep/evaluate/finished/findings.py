"""Paired comparison of each side with the reference, over videos, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.evaluate.finished.figures import Figures
from fewstep.evaluate.finished.measures import BY_NAME, MEASURES, Measure
from fewstep.metrics import mean_interval, ratio_of_means
from fewstep.metrics.statistics import FEWEST, ratio_interval

Verdict = Literal["more", "less", "equal", "unclear"]
NAMED, LISTED = 4, 6
"""Videos and measures that a sentence names; it counts more of them."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measure of one side, compared with the reference over the videos that both can be measured on."""

    side: str
    measure: str
    videos: int
    mean: float
    reference: float
    compared: float | None
    """Mean over the reference's mean, or minus it, by the measure's kind; None for a ratio to nothing."""
    interval: tuple[float, float] | None
    """95 % interval of `compared`, Student's t over videos; None with a single video."""
    more: int
    """Videos that have more than the reference's by more than the margin; `less` likewise."""
    less: int
    verdict: Verdict
    """more or less: the whole interval is beyond the margin. equal: all of it is within. unclear: neither."""
    faults: tuple[str, ...] = ()
    """Videos with a fault that the reference's has not, for measures of faults."""

    @property
    def margins(self) -> float:
        """How many margins the side is from the reference."""
        return abs(BY_NAME[self.measure].distance(self.mean, self.reference))


def find(side: str, names: Sequence[str], mine: Sequence[Figures], reference: Sequence[Figures]) -> list[Finding]:
    """The findings of one side, from the figures of its videos and of the reference's, in equal order."""
    found = []
    for measure in MEASURES:
        pairs = [
            (name, a[measure.name], b[measure.name])
            for name, a, b in zip(names, mine, reference, strict=True)
            if a[measure.name] is not None and b[measure.name] is not None
        ]
        if pairs:
            found.append(_finding(side, measure, pairs))  # type: ignore[arg-type]
    return found


def _finding(side: str, measure: Measure, pairs: Sequence[tuple[str, float, float]]) -> Finding:
    own, other = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (1, 2))
    apart = [measure.distance(a, b) for _, a, b in pairs]
    if measure.kind == "ratio":
        compared, interval = ratio_of_means(own, other), ratio_interval(own, other)
    else:
        compared, interval = float((own - other).mean()), mean_interval(own - other)
    known = math.isfinite(compared)
    ends = (float(interval.low), float(interval.high)) if known and len(pairs) >= FEWEST else None
    return Finding(
        side=side, measure=measure.name, videos=len(pairs), mean=float(own.mean()), reference=float(other.mean()),
        compared=compared if known else None, interval=ends, more=sum(x > 1 for x in apart), less=sum(x < -1 for x in apart),
        verdict="unclear" if ends is None else _verdict(measure, ends),
        faults=tuple(pair[0] for pair, x in zip(pairs, apart, strict=True) if measure.fault and x > 1),
    )  # fmt: skip


def _verdict(measure: Measure, ends: tuple[float, float]) -> Verdict:
    low, high = (
        (1 / (1 + measure.margin), 1 + measure.margin) if measure.kind == "ratio" else (-measure.margin, measure.margin)
    )
    if ends[0] > high:
        return "more"
    if ends[1] < low:
        return "less"
    return "equal" if ends[0] >= low and ends[1] <= high else "unclear"


def verdict(found: Sequence[Finding], reference: str) -> Iterator[str]:
    """The findings of one side in plain sentences, the largest difference first."""
    if not found:
        return
    side, videos = found[0].side, max(finding.videos for finding in found)
    named = sorted((f for f in found if f.verdict in ("more", "less")), key=lambda f: -f.margins)
    if videos < FEWEST:
        named = sorted((f for f in found if f.margins > 1), key=lambda f: -f.margins)
        yield f"{side}: one video says nothing about others, so there are no intervals. This video has:"
    for finding in named:
        yield f"{side}: {sentence(finding)}."
    for finding in found:
        if finding.faults and finding not in named:
            count = f"{len(finding.faults)} of {finding.videos} videos"
            yield f"{side}: more {BY_NAME[finding.measure].title} than {reference} in {count}: {_some(finding.faults)}."
    rest = [f for f in found if f not in named and not f.faults and f.interval is not None]
    equal, unclear = ([BY_NAME[f.measure].title for f in rest if f.verdict == kind] for kind in ("equal", "unclear"))
    if not named and not any(f.faults for f in found):
        yield f"{side}: no difference from {reference} is shown."
    if equal:
        yield f"{side}: about equal to {reference} in {_listed(equal)}."
    if unclear:
        yield f"{side}: too few videos, or too different ones, to tell about {_listed(unclear)}."


def sentence(finding: Finding) -> str:
    """One finding: `2.4 times the reference's saturation [2.1, 2.7], more in 8 of 8 videos`."""
    measure = BY_NAME[finding.measure]
    more = finding.mean > finding.reference
    count = f"{'more' if more else 'less'} in {finding.more if more else finding.less} of {finding.videos} videos"
    if measure.kind == "ratio" and finding.compared is not None:
        ends = "" if finding.interval is None else f" [{finding.interval[0]:.2f}, {finding.interval[1]:.2f}]"
        return f"{_times(finding.compared)} the reference's {measure.title}{ends}, {count}"
    values = f"{measure.written(finding.mean)}, the reference's {measure.written(finding.reference)}"
    ends = "" if finding.interval is None else f" (difference {measure.between(finding.interval)})"
    return f"{measure.title} {values}{ends}, {count}"


def apart(mine: Mapping[str, float | None], reference: Mapping[str, float | None]) -> list[tuple[Measure, float]]:
    """The measures in which one video differs by more than the margin, with the number of margins, largest first."""
    found = [(measure, measure.distance(mine[measure.name], reference[measure.name])) for measure in MEASURES]
    return sorted((pair for pair in found if abs(pair[1]) > 1), key=lambda pair: -abs(pair[1]))


def _times(ratio: float) -> str:
    return "almost nothing of" if ratio < 0.01 else f"{ratio:.2f} times" if ratio < 2 else f"{ratio:.1f} times"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _listed(names: Sequence[str]) -> str:
    if len(names) > LISTED:
        return f"{len(names)} measures"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
