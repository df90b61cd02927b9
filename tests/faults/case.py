"""What a case of the corpus is: a command or call on prepared input that must be refused rightly.

Right means: exit code 2; one clear line on standard error that names what is wrong; no traceback, no hang, nothing lost.
A file of cases has a tuple `CASES`; `test_faults.py` and `python tests/faults` find it by itself.

    CASES = (
        Case("steps of 0", ("distill", "r.yaml", "--dry-run"), says=("settings.steps", "0"), files={"r.yaml": "..."}),
    )
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

LONGEST = 700
"""Characters of a message: more is a wall, not a line."""
INNARDS = (
    "Traceback", "frame #", "NoneType", "object has no attribute", "unexpected keyword argument",
    "positional argument", "object is not", "unhashable", "INTERNAL ASSERT", "is refused by",
)  # fmt: skip
"""What only those understand who wrote the program."""
MEMORY = 6 << 30
"""Bytes of address space that a case may take beyond what the process has: an absurd size fails and harms nobody."""


class Hang(BaseException):
    """The time of a case is over. No `except Exception` stops it."""


@dataclass(frozen=True)
class Case:
    """One bad input. It runs in an empty folder `here`; relative names in `words` and `files` lie there."""

    name: str
    words: tuple[Any, ...] = ()
    """A command line, as `fewstep` gets it."""
    says: tuple[str, ...] = ()
    """What the message must contain: the file, key, option or value at fault. Case is ignored, and so are line breaks."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Files to write first, by name."""
    prepare: Callable[[Path], object] | None = None
    """What else to do first in the folder, after `files` are written; see `given.py`."""
    call: Callable[[], object] | None = None
    """A call of the library in place of a command: it must raise what the command line answers with one line."""
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Holds while the command runs: a full disk, another environment."""
    code: int = 2
    writes: bool = False
    """Whether the command may leave new files in its folder. A file that was there is never changed or deleted."""
    seconds: float = 20.0
    """Largest processor time. More, or five times as much wall-clock time, counts as a hang."""
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None
    """None: it raised, or it hung."""
    out: str
    err: str
    raised: BaseException | None = None


def problem(case: Case, folder: Path) -> str:
    """Run a case in a fresh `folder`: what is wrong with the answer, or nothing if it is right."""
    here = folder / "here"
    here.mkdir(parents=True)
    with contextlib.chdir(here):
        for name, content in case.files.items():
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if case.prepare is not None:
            case.prepare(here)
        before = _contents(folder)
        with case.during():
            outcome = run(case.words, call=case.call, seconds=case.seconds)
    return _misjudged(case, outcome) or _lost(before, _contents(folder), here if case.writes else None)


def run(words: tuple[Any, ...], *, call: Callable[[], object] | None = None, seconds: float = 20.0) -> Outcome:
    """A command in this process, with its output, under a limit of time and memory."""
    from fewstep.cli import _is_mistake, _one_line, main

    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    raised: BaseException | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), _limits(seconds):
        warnings.simplefilter("ignore")
        try:
            if call is None:
                code = main([str(word) for word in words])
            else:
                call()
                code = 0
        except (Exception, SystemExit, Hang) as error:
            raised = error
            if call is not None and isinstance(error, Exception) and _is_mistake(error):
                code = 2
                err.write(f"fewstep: {_one_line(error)}\n")
    return Outcome(code, out.getvalue(), err.getvalue(), raised)


def _misjudged(case: Case, outcome: Outcome) -> str:
    if isinstance(outcome.raised, Hang):
        return f"hang: no answer in {case.seconds:g} s"
    if outcome.code is None:
        return f"traceback: {type(outcome.raised).__name__}: {str(outcome.raised)[:300]}"
    if outcome.code != case.code:
        return f"silence: exit code {outcome.code} instead of {case.code}\n{outcome.out[-300:]}{outcome.err[-300:]}"
    if case.code == 0:
        return ""
    text = " ".join(word for word in outcome.err.split() if set(word) - set("│╭╰╮╯─"))
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    parsed = "For full helptext" in text  # the parser's own frame of several lines
    if not parsed and (len(lines) != 1 or not lines[0].startswith("fewstep: ")):
        return f"not one line: {outcome.err[-400:]!r}"
    if not parsed and len(text) > LONGEST:
        return f"a wall of {len(text)} characters: {text[:200]}..."
    for word in INNARDS:
        if word in text and not parsed:
            return f"speaks of innards ({word}): {text[:400]}"
    missing = [word for word in case.says if word.lower() not in text.lower()]
    return f"does not name {missing}: {text[:500]}" if missing else ""


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file: what is written anew has another time."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _lost(before: dict[Path, tuple[int, int]], after: dict[Path, tuple[int, int]], free: Path | None) -> str:
    """`free` is the folder in which new files may appear."""
    for path, state in before.items():
        if after.get(path) != state:
            return f"loss: {path.name} was {'changed' if path in after else 'deleted'}"
    new = [path for path in after.keys() - before.keys() if free is None or not path.is_relative_to(free)]
    return f"leaves behind {sorted(str(path) for path in new)[:3]}" if new else ""


@contextlib.contextmanager
def _limits(seconds: float) -> Iterator[None]:
    """Hang after so many seconds; MemoryError (torch: RuntimeError) where an absurd size is really asked for."""

    def over(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, over), signal.signal(signal.SIGPROF, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, 5 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with _less_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, old[0])
        signal.signal(signal.SIGPROF, old[1])


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
