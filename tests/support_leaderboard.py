"""Figures and results that tests of the leaderboard share."""

from __future__ import annotations

from fewstep.leaderboard import Figures, Result

RECIPE = """# A test.
model: {type: Pretrained, source: world}
method: {type: Consistency, guidance: {scale: 2.0}, intervals: 48, skip: 1, decay: 0.5}
data: {type: WorldClips, pool: 64}
settings: {steps: 10, batch: 2}
"""


def figures(accuracy: float, frechet: float = 2.0, width: float = 0.05) -> Figures:
    return Figures(
        accuracy=accuracy, accuracy_ci=(accuracy - width, accuracy + width), frechet=frechet,
        frechet_ci=(frechet * 0.9, frechet * 1.1), motion=0.05, diversity=0.4, flicker=0.1,
    )  # fmt: skip


def result(name: str, rows: dict[int, Figures], *, budget: float = 1.0, seed: int = 0) -> Result:
    return Result(
        name=name, method="M", code="c", budget=budget, seed=seed, iterations=10, spent=1.0, seconds=60.0, memory_mb=1024.0,
        rows=rows, floor=0.4, machine={}, versions={},
    )  # fmt: skip
