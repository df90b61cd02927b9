"""Every case of the corpus is answered rightly, and the corpus notices answers that are not right."""

from __future__ import annotations

import importlib
import re
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from faults.case import Case, problem

HERE = Path(__file__).parent
AREAS = sorted(path.stem for path in HERE.glob("[a-z]*.py") if re.search(r"^CASES\b", path.read_text(), re.M))


def cases() -> list[object]:
    """All cases with the name of their file; slow ones are marked."""
    return [
        pytest.param(case, id=f"{area}: {case.name}", marks=[pytest.mark.slow] if case.slow else [])
        for area in AREAS
        for case in importlib.import_module(f"faults.{area}").CASES
    ]


@pytest.mark.parametrize("case", cases())
def test_a_fault_is_answered_rightly(case: Case, tmp_path: Path, single_thread: None) -> None:
    assert problem(case, tmp_path) == ""


def raising(error: BaseException) -> Case:
    def call() -> None:
        raise error

    return Case("", call=call, says=("card.json",))


def test_names_differ() -> None:
    ids = [parameter.id for parameter in cases()]  # type: ignore[attr-defined]
    assert len(ids) == len(set(ids))


def test_wrong_answers_are_noticed(tmp_path: Path) -> None:
    def deletes() -> None:
        (Path() / "kept.txt").unlink()
        raise ValueError("card.json is torn")

    wrong = {
        "traceback: TypeError": raising(TypeError("card.json")),
        "does not name ['card.json']": raising(ValueError("something is wrong")),
        "speaks of innards": raising(ValueError("card.json: 'NoneType' object")),
        "a wall of": raising(ValueError("card.json " * 200)),
        "silence: exit code 0": Case("", call=lambda: None),
        "hang": Case("", call=lambda: time.sleep(5), seconds=0.05),
        "loss: kept.txt was deleted": Case("", call=deletes, files={"kept.txt": "mine"}),
        "leaves behind": Case("", ("explain", "nowhere"), during=lambda: nullcontext(Path("new.txt").touch())),
        "traceback: MemoryError": Case("", call=lambda: bytearray(64 << 30)),
    }
    for number, (words, case) in enumerate(wrong.items()):
        assert problem(case, tmp_path / str(number)).startswith(words)
    assert problem(raising(ValueError("card.json is torn")), tmp_path / "right") == ""
