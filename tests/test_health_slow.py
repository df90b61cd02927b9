"""On the built-in world every spoiled run is named within 200 iterations, and no sound run is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.models.bundle import BUILT_IN
from support_health import LIMIT, SOUND_RUNS, SPOILED, run_sound, run_spoiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("every_core"),
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (BUILT_IN / "teacher" / "card.json").is_file(), reason="the built-in teacher is not here"),
]


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_run_is_named(name: str, tmp_path: Path) -> None:
    made = run_spoiled(name, tmp_path)
    print(f"\n{name}: {made.word} at step {made.step}: {made.reason} ({made.seconds:.0f} s)")
    assert (made.word, made.step <= LIMIT) == (SPOILED[name].word, True)
    assert SPOILED[name].because in made.reason


@pytest.mark.parametrize("name", SOUND_RUNS)
def test_a_sound_run_is_not_blamed(name: str, tmp_path: Path) -> None:
    made = run_sound(name, tmp_path)
    print(f"\n{name}: {made.word} at step {made.step}: {made.reason} ({made.seconds:.0f} s)")
    assert {check.verdict.word for check in made.record.checks} == {"improving"}, made.reason
    assert made.step == LIMIT
