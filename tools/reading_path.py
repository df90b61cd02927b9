"""The reading path: how many files, and lines, lead from a recipe to the loss of DMD2.

    python tools/reading_path.py [RECIPE]      print the files; exit 1 above the budget

One iteration of the recipe (world/dmd2) is run, with a batch of one. On the path is every file of the package
with a function that is on the call stack between the command and the loss of the student, and every file with a function
that the loss runs, but for what is inside a network: who has read them knows what is trained on what. A file counts with all
its lines. What is done once before (reading the recipe, loading, optimisers) is other reading.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fewstep"
FILES, LINES = 10, 1500
"""The budget of the world's recipe."""
LOSS, NETWORK = "student_loss", "models/denoiser.py"
"""The function, and the file, at which the path ends."""
QUICK = {"settings.batch": "1", "settings.compile": "false"}

STOPPED = 130
"""The command's exit code when it is interrupted."""


class Trail:
    """Notes the files on the way to the loss, and in it."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and frame.f_code.co_name == LOSS and result is not None:
            raise KeyboardInterrupt  # the way is known
        if event == "call" and frame.f_code.co_name == LOSS:
            self.files |= dict.fromkeys(reversed(list(_files(frame.f_back))))
        if event == "call" and self.files and _file(frame):
            stack = list(_frames(frame))
            names = [f.f_code.co_name for f in stack]
            if LOSS in names and not any(_file(f) == NETWORK for f in stack[1 : names.index(LOSS)]):
                self.files.setdefault(str(_file(frame)))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _files(frame: FrameType | None) -> Iterator[str]:
    return (file for file in map(_file, _frames(frame)) if file is not None)


def _file(frame: FrameType) -> str | None:
    """The frame's file, relative to the package; None for a file outside the package."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def trace(recipe: str) -> list[str]:
    """The files on the path, in the order in which they are met."""
    sys.path.insert(0, str(ROOT / "src"))
    from fewstep.cli import main as fewstep

    trail = Trail()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
        sys.setprofile(trail)
        try:
            code = fewstep(["distill", recipe, "--output", f"{folder}/run", "--quiet", *overrides])
        finally:
            sys.setprofile(None)
    if code != STOPPED or not trail.files:
        raise SystemExit(f"{recipe} could not be traced (exit code {code}); run it by hand: fewstep distill {recipe}")
    return list(trail.files)


def main(words: list[str]) -> int:
    files = trace(words[0] if words else "world/dmd2")
    lines = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in files}
    for file, count in lines.items():
        print(f"{count:6} {file}")
    print(f"{sum(lines.values()):6} lines in {len(lines)} files (budget: {LINES} in {FILES})")
    return int(len(lines) > FILES or sum(lines.values()) > LINES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
