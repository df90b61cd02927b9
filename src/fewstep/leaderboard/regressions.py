"""What a run that is repeated, because its recipe or its code changed, does worse than before."""

from __future__ import annotations

from typing import get_args

from fewstep.diffusion.times import in_steps
from fewstep.leaderboard.claims import Figure, compared, value
from fewstep.leaderboard.results import Result


def fallen(stored: Result, made: Result, teacher: Result) -> list[str]:
    """A line for each step count and figure in which `made` is worse than `stored`, and their intervals do not touch.

    Motion is worse where it is farther from the teacher's. It and diversity are relative to the teacher's.
    """
    lines = [f"not served in {in_steps(n)} any more" for n in stored.rows if n not in made.rows]
    both = [(n, stored.rows[n], made.rows[n]) for n in stored.rows if n in made.rows]
    for n, before, after in both:
        for figure in get_args(Figure):
            if compared(after, before, figure, teacher.most) < 0:
                now, then = (value(row, figure, teacher.most) for row in (after, before))
                lines.append(f"{figure} in {in_steps(n)}: {now:.2f}, was {then:.2f}")
    return lines
