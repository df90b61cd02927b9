"""The losses of twenty steps of every method, stored as text: a change that should not alter numbers must not.

`python -m pytest tests/test_golden.py --update-golden` writes the files anew, for changes that should; their diff then
shows before and after.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.engine import train
from fewstep.engine.log import read_metrics
from support_engine import CASES, Everything, small, tiny_model

FOLDER = Path(__file__).parent / "golden"
RELATIVE, ABSOLUTE = 1e-4, 1e-7
"""Other kernels round differently: scalar ones instead of AVX-512 change these losses by up to 1e-5 (r1), mostly 1e-6."""

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("case", CASES)
def test_losses_are_as_stored(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    train(tiny_model(), CASES[case], Everything(), small(20), tmp_path, quiet=True)
    losses = {
        (row["step"], name.removeprefix("loss/")): value
        for row in read_metrics(tmp_path / "metrics.jsonl")
        for name, value in row.items()
        if name.startswith("loss/")
    }
    file = FOLDER / f"{case}.txt"
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text("".join(f"{step} {name} {value:.8g}\n" for (step, name), value in losses.items()))
    stored = {(int(step), name): float(value) for step, name, value in map(str.split, file.read_text().splitlines())}
    assert stored.keys() == losses.keys()
    assert losses == pytest.approx(stored, rel=RELATIVE, abs=ABSOLUTE)


def test_every_file_has_its_method() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(CASES)
