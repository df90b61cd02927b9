"""What papers claim, as differences between two rows of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.leaderboard.results import Figures, Result

Figure = Literal["accuracy", "frechet", "motion", "diversity"]
SMALLER = ("frechet", "motion")
"""Figures whose interval (of motion: of the distance to the teacher's) is better where it is smaller."""
RELATIVE = ("motion", "diversity")
"""Figures that are told relative to the teacher's at its own steps."""
STILL = 1e-6
"""Motion, relative to the teacher's, below which a clip stands still."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`better` is better than `worse` in one figure. Motion is better the nearer it is to the teacher's at its own steps."""

    cite: str
    text: str
    better: str
    """Name of a row; `worse` too."""
    worse: str
    figure: Figure = "accuracy"
    steps: int = 1


CLAIMS: tuple[Claim, ...] = (
    Claim(
        cite="2405.14867",
        text="Distribution matching makes better one-step students than regression on the teacher's trajectories.",
        better="dmd2", worse="knowledge_distillation",
    ),
    Claim(
        cite="2405.14867", text="Distribution matching makes better four-step students than consistency.",
        better="dmd2", worse="consistency", steps=4,
    ),
    Claim(
        cite="2405.14867", text="It loses diversity, which regression keeps.",
        better="knowledge_distillation", worse="dmd2", figure="diversity",
    ),
    Claim(
        cite="2502.15681", text="The Jensen-Shannon divergence keeps more diversity than the reverse KL.",
        better="f_distill", worse="dmd2", figure="diversity",
    ),
    Claim(
        cite="2505.12674", text="SiD is better than distribution matching in four steps.",
        better="sid", worse="dmd2", figure="frechet", steps=4,
    ),
    Claim(
        cite="2503.06674", text="Matching along the trajectory is better than at its end, in four steps.",
        better="tdm", worse="dmd2", steps=4,
    ),
    Claim(
        cite="2510.27684", text="Phases with experts keep more motion than random exits of one student, in four steps.",
        better="phased_dmd", worse="dmd2", figure="motion", steps=4,
    ),
    Claim(
        cite="2511.22677", text="Guidance that is read at a time of its own is better than at that of the scores, in four steps.",
        better="decoupled_dmd", worse="dmd2", steps=4,
    ),
    Claim(
        cite="2406.04103", text="Moment matching is weak in one step.",
        better="dmd2", worse="moment_matching",
    ),
    Claim(
        cite="2501.08316", text="Adversarial post-training makes better one-step students than consistency, where it starts.",
        better="apt", worse="consistency", figure="frechet",
    ),
    Claim(
        cite="2402.13929", text="A discriminator makes better students of progressive distillation than the regression does.",
        better="lightning", worse="progressive", figure="frechet",
    ),
    Claim(
        cite="2503.13319", text="A teacher that leans to its critic makes better students of adapters, in four steps.",
        better="magic_distillation", worse="magic_distillation+plain_teacher", figure="frechet", steps=4,
    ),
)  # fmt: skip
"""Claims that the table can judge."""


@dataclass(frozen=True)
class Verdict:
    """What the table says of a claim at one budget."""

    claim: Claim
    outcome: Literal["confirmed", "contradicted", "not told apart", "not measured"]
    better: float | None = None
    worse: float | None = None
    seeds: tuple[int, int] = (0, 0)
    """Number of runs of each side."""


def judge(claim: Claim, results: Sequence[Result], reference: Figures) -> Verdict:
    """Confirmed or contradicted only if the two rows' intervals do not touch; with several seeds, those of all pairs of seeds.

    `results` are runs with one budget, and `reference` are the teacher's figures at its own steps.
    """
    better, worse = (_rows(results, name, claim.steps) for name in (claim.better, claim.worse))
    if not better or not worse or not all(measured(row, claim.figure) for row in (*better, *worse)):
        return Verdict(claim, "not measured")
    means = [sum(value(row, claim.figure, reference) for row in rows) / len(rows) for rows in (better, worse)]
    signs = {compared(one, other, claim.figure, reference) for one in better for other in worse}
    outcome: Literal["confirmed", "contradicted", "not told apart"] = "not told apart"
    if signs == {1}:
        outcome = "confirmed"
    elif signs == {-1}:
        outcome = "contradicted"
    return Verdict(claim, outcome, means[0], means[1], (len(better), len(worse)))


def measured(row: Figures, figure: Figure) -> bool:
    """Whether the figure can be compared: a Frechet distance of few clips has no interval."""
    return figure != "frechet" or row.frechet_ci is not None


def value(row: Figures, figure: Figure, reference: Figures) -> float:
    """The figure as it is told."""
    own = float(getattr(row, figure))
    return own / float(getattr(reference, figure)) if figure in RELATIVE else own


def compared(one: Figures, other: Figures, figure: Figure, reference: Figures) -> int:
    """1: `one` is better, -1: worse, 0: their intervals touch, or one is not measured.

    Motion and diversity have no interval: a tenth is one. Motion is compared by |log(motion / teacher's)|: more of it than the
    teacher has is as wrong as less.
    """
    if not (measured(one, figure) and measured(other, figure)):
        return 0
    mine, theirs = _interval(one, figure, reference), _interval(other, figure, reference)
    if mine[0] <= theirs[1] and theirs[0] <= mine[1]:
        return 0
    larger = 1 if mine[0] > theirs[1] else -1
    return -larger if figure in SMALLER else larger


def _rows(results: Sequence[Result], name: str, steps: int) -> list[Figures]:
    return [result.rows[steps] for result in results if result.name == name and steps in result.rows]


def _interval(row: Figures, figure: Figure, reference: Figures) -> tuple[float, float]:
    own = {"accuracy": row.accuracy_ci, "frechet": row.frechet_ci}.get(figure)
    if own is not None:
        return own
    middle = value(row, figure, reference)
    if figure != "motion":
        return 0.95 * middle, 1.05 * middle
    away = abs(math.log(max(middle, STILL)))
    return away - 0.05, away + 0.05
