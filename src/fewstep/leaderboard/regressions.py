"""What a run that is repeated, because its recipe or its code changed, does worse than before."""

from __future__ import annotations

from typing import get_args

from fewstep.diffusion.times import in_steps
from fewstep.leaderboard.claims import Figure, compared, value
from fewstep.leaderboard.results import Result


def fallen(stored: Result, made: Result) -> list[str]:
    """A line for each step count and figure in which `made` is worse than `stored`, and their intervals do not touch."""
    lines = [f"not served in {in_steps(n)} any more" for n in stored.rows if n not in made.rows]
    both = [(n, stored.rows[n], made.rows[n]) for n in stored.rows if n in made.rows]
    for n, before, after in both:
        for figure in get_args(Figure):
            if compared(after, before, figure) < 0:
                lines.append(f"{figure} in {in_steps(n)}: {value(after, figure):.2f}, was {value(before, figure):.2f}")
    return lines
