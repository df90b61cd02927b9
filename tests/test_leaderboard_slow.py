"""Stored rows of the leaderboard, run again: none may fall. A row takes ten minutes and more of a core; choose one with -k."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import leaderboard
from fewstep.leaderboard import Run, contestants

RESULTS = leaderboard.load_results(Path(__file__).parents[1] / "bench" / "leaderboard")
STORED = [one for one in RESULTS if one.budget == 1]
TEACHER = next(one for one in RESULTS if one.name == leaderboard.TEACHER)


@pytest.mark.slow
@pytest.mark.usefixtures("every_core")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stored", STORED, ids=lambda one: f"{one.name}-{one.seed}")
def test_a_stored_row_does_not_fall(stored: leaderboard.Result, tmp_path: Path) -> None:
    again = Run(contestants()[stored.name], stored.budget, stored.seed)
    made = leaderboard.run(again, tmp_path / "results", tmp_path / "runs", quiet=True)
    assert leaderboard.fallen(stored, made, TEACHER) == []
