"""Run the corpus and count: `PYTHONPATH=src python tests/faults [area ...]` prints tried, right and bad of every area."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, whose names are its own


def main(wanted: list[str]) -> int:
    import torch

    from faults.case import problem
    from faults.test_faults import AREAS

    torch.set_num_threads(1)
    tried = right = 0
    for area in wanted or AREAS:
        began, bad = time.monotonic(), []
        found = importlib.import_module(f"faults.{area}").CASES
        for case in found:
            with tempfile.TemporaryDirectory() as folder:
                wrong = problem(case, Path(folder))
            bad += [f"  {case.name}: {wrong}"] if wrong else []
        tried, right = tried + len(found), right + len(found) - len(bad)
        seconds = time.monotonic() - began
        print(f"{area}: {len(found)} tried, {len(found) - len(bad)} right, {len(bad)} bad, {seconds:.1f} s")
        print(*bad, sep="\n", end="\n" if bad else "", flush=True)
    print(f"in all: {tried} tried, {right} right, {tried - right} bad")
    return int(tried > right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
