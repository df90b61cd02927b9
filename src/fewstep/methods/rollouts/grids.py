"""The time grids that a student is trained on, and the contract that follows from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch

from fewstep.core import Rng
from fewstep.diffusion import CFG, Contract, Exact, Sampler, Shifted, shifted
from fewstep.diffusion.times import check_grid

Grids = tuple[tuple[float, ...], ...]
"""One tuple of decreasing times per step count, before the shift and without the final 0."""
NESTED: Grids = ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25))
"""Grids for 1, 2 and 4 steps. Each grid contains the coarser ones."""


Exit = Literal["random", "last"]
"""Step at which a rollout stops. All processes draw the same step, because they must agree on the number of calls."""


Phase = tuple[float, float]
"""Some of the steps: those from times in (low, high]. Times of the grids, before the shift."""
WHOLE: Phase = (0.0, 1.0)


def stops(grids: Grids, exit: Exit, phase: Phase = WHOLE) -> list[range]:
    """The steps of each grid at which a rollout may stop."""
    low, high = phase
    steps = [[step for step, t in enumerate(grid) if low < t <= high] for grid in grids]
    return [range(found[0 if exit == "random" else -1], found[-1] + 1) for found in steps]


def deepest(grids: Grids, phase: Phase = WHOLE) -> dict[str, int]:
    """`Rollout.fullest` of a rollout that draws a grid and an exit: the longest grid, to its end."""
    which = [len(grid) for grid in grids].index(max(map(len, grids)))
    return {"grid": which, "exit": len(stops(grids, "random", phase)[which]) - 1}


def drawn(grids: Grids, exit: Exit, shift: float, rng: Rng, phase: Phase = WHOLE) -> tuple[tuple[float, ...], int]:
    """One of the grids, with its shifted times, and the step to stop at."""
    which = rng.integer("grid", len(grids))
    found = stops(grids, exit, phase)[which]
    return exact(grids, shift)[which], found[rng.integer("exit", len(found)) if exit == "random" else 0]


def ends(grids: Grids, exit: Exit, shift: float, phase: Phase = WHOLE) -> set[float]:
    """The shifted times of the steps at which a rollout may stop."""
    return {
        grid[step] for grid, found in zip(exact(grids, shift), stops(grids, exit, phase), strict=True) for step in found
    }


def latest_landing(grids: Grids, exit: Exit, shift: float, phase: Phase | None) -> float:
    """The largest time at which the last step of a rollout may land: after its first exit, or at the end of its phase."""
    exits = zip(exact(grids, shift), stops(grids, exit, phase or WHOLE), strict=True)
    which = 0 if phase is None else -1
    return max((*grid, 0.0)[found[which] + 1] for grid, found in exits)


def require_phase(grids: Grids, phase: Phase) -> None:
    """ValueError unless a phase has steps in every grid, and ends where a step begins, or where the clips are clean."""
    low, high = phase
    if not 0 <= low < high <= 1:
        raise ValueError(f"a phase is [low, high] with 0 <= low < high <= 1, got {list(phase)}")
    for grid in grids:
        if low not in (*grid, 0.0) or not any(low < t <= high for t in grid):
            raise ValueError(
                f"a phase [low, high] ends at a time of each grid, or at 0, and some steps begin in it; got {list(phase)} for "
                f"the grid {list(grid)}"
            )


def exact(grids: Grids, shift: float) -> Grids:
    """The shifted times of every grid, without the final 0. ValueError unless each grid decreases strictly from 1.

    A grid may be listed twice, so that it is drawn twice as often.
    """
    if not grids or not all(grids) or len({len(grid) for grid in grids}) != len(set(grids)):
        raise ValueError(
            f"grids needs one list of times for each number of steps, such as [[1.0], [1.0, 0.5]], got {grids}"
        )
    for grid in grids:
        if grid[0] != 1 or grid[-1] <= 0 or not all(a > b for a, b in pairwise(grid)):
            raise ValueError(
                "each of the grids decreases strictly from 1.0 to a time above 0, without the final 0, which is always added; "
                f"times are timestep / 1000, before the shift; got {list(grid)}"
            )
    moved = [tuple(float(t) for t in shifted(torch.tensor(g, dtype=torch.float64), shift)) for g in grids]
    return tuple(check_grid((*g, 0.0))[:-1] for g in moved)


def student_contract(
    teacher: Contract, grids: Grids, shift: float, sampler: Sampler, guidance: CFG = CFG()
) -> Contract:
    """The teacher's contract with the student's sampler and exact times (`grids` before the shift).

    `guidance` is the guidance that sampling still needs: none if guidance was distilled into the student at all times. A method
    that distils it at some times leaves the rest, for example `CFG(low=0.9, outside=3.0)` after one of two experts.
    """
    listed = tuple(dict.fromkeys((*grid, 0.0) for grid in exact(grids, shift)))
    grid = Exact(grids=listed, otherwise=Shifted(shift=shift))
    return replace(teacher, grid=grid, sampler=sampler, steps=grid.counts[-1], guidance=guidance)
