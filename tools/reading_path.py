"""The reading path: how many files, and lines, lead from a recipe to the loss of its method.

    python tools/reading_path.py [RECIPE]      print the files; exit 1 above the budget

One iteration of the recipe (world/dmd2) is run, with a batch of one. On the path is every file with a function that is on the
call stack between `Recipe.run` and the student's loss, every file with a function that the method's own file calls until the
loss is there, and every file of the methods' room that a matching, which the method holds, calls for its loss. A file counts
with all its lines. The types that everyone shares (`core`) are known, and so is what these files call in turn, by its name and
docstring; with --deep both count, down to the networks.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fewstep"
FILES, LINES = 12, 1500
"""The budget of the world's recipe."""
HELD = "methods/matching/"
"""The room of the losses that a method holds."""
START, LOSS, NETWORK = "recipe.py", "student_loss", "models/denoiser.py"
"""The file at which the path starts, the function at which it ends, and the file below which networks are."""
QUICK = {
    "settings.steps": "1",
    "method.critic_updates": "1",
    "settings.health": "null",
    "settings.batch": "1",
    "settings.compile": "false",
}

STOPPED = 130
"""The command's exit code when it is interrupted."""


class Trail:
    """Notes the files on the way to the loss, and in it."""

    def __init__(self, *, deep: bool) -> None:
        self.deep = deep
        self.files: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and frame.f_code.co_name == LOSS and result is not None:
            raise KeyboardInterrupt  # the way is known
        if event == "call" and frame.f_code.co_name == LOSS:
            stack = [file for file in map(_file, _frames(frame)) if file is not None]
            start = max(index for index, file in enumerate(stack) if file == START)
            self.files |= dict.fromkeys(reversed(stack[: start + 1]))
            self.method = stack[0]
        if event == "call" and self.files and (file := _file(frame)) and self.counts(frame):
            self.files.setdefault(file)

    def counts(self, frame: FrameType) -> bool:
        """Whether a call, made while the loss is computed, is part of the path."""
        stack = list(_frames(frame))
        names = [f.f_code.co_name for f in stack]
        if LOSS not in names[1:]:
            return False
        callers = [file for f in stack[1 : names.index(LOSS, 1) + 1] if (file := _file(f)) is not None]
        if self.deep:
            return NETWORK not in callers
        file = str(_file(frame))
        held = callers[0].startswith(HELD) and file.startswith("methods/")
        return (callers[0] == self.method or held) and not file.startswith("core/")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str | None:
    """The frame's file, relative to the package; None for a file outside the package."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def trace(recipe: str, *, deep: bool = False) -> list[str]:
    """The files on the path, in the order in which they are met."""
    sys.path.insert(0, str(ROOT / "src"))
    from fewstep.cli import main as fewstep
    from fewstep.engine.run import Run
    from fewstep.methods.base import Update

    trail, update = Trail(deep=deep), Run.update

    def traced(self: Run, event: Update, *args: Any) -> Any:
        if event.roles == ("student",):
            sys.setprofile(trail)
        return update(self, event, *args)

    with tempfile.TemporaryDirectory() as folder:
        overrides = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
        Run.update = traced  # type: ignore[method-assign, assignment]
        try:
            code = fewstep(["distill", recipe, "--output", f"{folder}/run", "--quiet", *overrides])
        finally:
            sys.setprofile(None)
            Run.update = update  # type: ignore[method-assign]
    if code != STOPPED or not trail.files:
        raise SystemExit(f"{recipe} could not be traced (exit code {code}); run it by hand: fewstep distill {recipe}")
    return list(trail.files)


def lines_of(files: Iterable[str]) -> Counter[str]:
    """How many lines each of the package's files has."""
    return Counter({file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in files})


def main(words: list[str]) -> int:
    deep, recipes = "--deep" in words, [word for word in words if word != "--deep"]
    files = trace(recipes[0] if recipes else "world/dmd2", deep=deep)
    lines = lines_of(files)
    for file, count in lines.items():
        print(f"{count:6} {file}")
    print(f"{lines.total():6} lines in {len(lines)} files" + ("" if deep else f" (budget: {LINES} in {FILES})"))
    return int(not deep and (len(lines) > FILES or lines.total() > LINES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
