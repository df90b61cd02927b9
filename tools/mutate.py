"""Plant small mistakes in the source, one at a time, and see whether a test of meaning fails.

    python tools/mutate.py                      the whole list in tests/mutations/*.yaml; exits 1 below the targets
    python tools/mutate.py --only r1            those whose file or mistake matches the regular expression `r1`
    python tools/mutate.py --check              run nothing: is every mutation still one of the source as it stands?

A mutation is data: the exact old text, which stands once in its file, the new text, and the tests that must fail. Where
these pass, the golden losses are tried: a mistake that only they notice is one `--update-golden` away from being blessed.
The tree is never written to. A process that has imported the library and the tests forks a child for each mutation. The
child exchanges the code of the functions that the mutation changes, and runs pytest. Where more than the inside of a
function changes (a constant, a decorator), the child comes from a process that has not imported the library, and is given
the mutated source when it does. A test that starts processes of its own does not see the mutation there: name another one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS, LIST = ROOT / "src" / "fewstep", ROOT / "tests", ROOT / "tests" / "mutations"
GOLDEN = "test_golden.py"
WORKERS, SECONDS = 2, 600
"""Children at once, and the longest that one may take: a mistake that never ends is noticed by that."""
KILLED, GOLDEN_ONLY, SURVIVED, STALE = "killed", "golden only", "survived", "stale"
LIBRARIES = ("pytest", "pytest_timeout", "torch", "transformers", "diffusers.models.transformers.transformer_wan")
"""What takes long to import and no mutation touches."""
LEAST_KILLED, MOST_GOLDEN = 0.97, 0.03
LIVING: dict[tuple[str, str, int], list[FunctionType]] = {}
"""The library's functions by file, name and line, once they are imported."""


@dataclass(frozen=True)
class Mutation:
    """One mistake that somebody could make."""

    file: str
    """Below src/fewstep."""
    mistake: str
    """In a few words: what is wrong then."""
    old: str
    new: str
    tests: tuple[str, ...]
    """What must fail: pytest's names, below tests."""

    @property
    def room(self) -> str:
        return self.file.partition("/")[0].removesuffix(".py")

    @property
    def stale(self) -> str:
        """Why it is no mutation of the source as it stands; empty where it is one."""
        if not self.path.is_file():
            return "there is no such file"
        if found := [test for test in self.tests if test.startswith(GOLDEN)]:
            return f"{found[0]} holds golden losses; name a test of meaning"
        if not self.tests:
            return "no test is named"
        if self.old == self.new:
            return "old and new text are equal"
        count = self.path.read_text(encoding="utf-8").count(self.old)
        return "" if count == 1 else f"the old text stands there {count} times instead of once"

    @property
    def path(self) -> Path:
        return SOURCE / self.file

    def source(self) -> str:
        return self.path.read_text(encoding="utf-8").replace(self.old, self.new)

    def codes(self) -> tuple[CodeType, CodeType]:
        """Compiled code of the file without the mistake, and with it."""
        before, after = self.path.read_text(encoding="utf-8"), self.source()
        return tuple(compile(text, str(self.path), "exec", dont_inherit=True) for text in (before, after))  # type: ignore[return-value]

    @property
    def inside_functions(self) -> bool:
        """Whether it changes functions only, and nothing of what is run when the file is imported."""
        before, after = self.codes()
        return frame(before) == frame(after)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation."""

    mutation: Mutation
    verdict: str
    seconds: float = 0.0
    why: str = ""
    """The test that failed, or why the mutation is stale."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="See which planted mistakes the tests notice.")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="mutations whose file or mistake matches this regex"
    )
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if a mutation is stale")
    options = parser.parse_args(argv)
    chosen = [m for m in mutations() if re.search(options.only, f"{m.file}: {m.mistake}")]
    if not chosen:
        print(f"no mutation matches {options.only!r}")
        return 1
    stale = [Outcome(m, STALE, why=m.stale) for m in chosen if m.stale]
    if options.check:
        say(stale)
        return 1 if stale else 0
    begun = time.monotonic()
    outcomes = [*stale, *tried([m for m in chosen if not m.stale])]
    say(o for o in outcomes if o.verdict != KILLED)
    print(table(outcomes))
    print(f"{time.monotonic() - begun:.0f} s")
    return 0 if enough(outcomes) else 1


def mutations(folder: Path = LIST) -> list[Mutation]:
    """The whole list; in each file of it: source file -> list of mutations."""
    listed = []
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for file, entries in yaml.safe_load(text).items():
            if len(re.findall(f"^{re.escape(file)}:$", text, re.MULTILINE)) > 1:  # YAML would lose all but the last
                raise SystemExit(f"{path}: {file} is listed twice; put its mutations into one list")
            for entry in entries:
                tests = entry.get("tests", [])
                named = (tests,) if isinstance(tests, str) else tuple(tests)
                listed.append(Mutation(file, entry["mistake"], entry["old"], entry["new"], named))
    return listed


def tried(chosen: Sequence[Mutation]) -> list[Outcome]:
    """Run each mutation's tests; where they pass, the golden losses. RuntimeError where a test fails without a mistake."""
    prepare()
    before, inside = [m for m in chosen if not m.inside_functions], [m for m in chosen if m.inside_functions]
    named = sorted({test for m in chosen for test in m.tests})
    for child in forked([(None, named[i::WORKERS]) for i in range(min(WORKERS, len(named)))]):
        if child.code:
            raise RuntimeError(
                f"without a mutation every test must pass; one does not, or is not there:\n{child.output}"
            )
    outcomes = outcomes_of(before)  # while nothing of the library is imported
    collect({test.partition("::")[0] for test in (*named, GOLDEN)})
    return outcomes + outcomes_of(inside)


def outcomes_of(chosen: Sequence[Mutation]) -> list[Outcome]:
    children = dict(zip(chosen, forked([(m, m.tests) for m in chosen]), strict=True))
    outcomes = [judged(m, child, KILLED) for m, child in children.items() if child.code]
    survivors = [m for m, child in children.items() if not child.code]
    golden = forked([(m, [GOLDEN]) for m in survivors])
    return outcomes + [
        judged(m, c, GOLDEN_ONLY if c.code else SURVIVED) for m, c in zip(survivors, golden, strict=True)
    ]


def judged(mutation: Mutation, child: Child, verdict: str) -> Outcome:
    """What the child has shown; nothing, if it could not even import the mutated source."""
    if child.code > 1 or "ERROR collecting" in child.output or "while loading conftest" in child.output:
        return Outcome(mutation, STALE, child.seconds, "the mutated source cannot be imported")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", child.output, re.MULTILINE)
    return Outcome(mutation, verdict, child.seconds, failed[1] if failed else "")


# --- children ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """What a forked pytest said."""

    code: int
    output: str
    seconds: float


def prepare() -> None:
    """Import what every child needs, and nothing of the library."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a second per child
    sys.path.insert(0, str(SOURCE.parent))
    for name in LIBRARIES:
        importlib.import_module(name)
    if any(name.partition(".")[0] == "fewstep" for name in sys.modules):
        raise RuntimeError("fewstep is imported already, so no mutation would be seen; run tools/mutate.py by itself")


def collect(files: Iterable[str]) -> None:
    """Import these tests, and what they import, into this process, and find every function of the library."""
    os.chdir(ROOT)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        run_pytest(files, "--collect-only")
    gc.unfreeze()  # tests/conftest.py hides from it what is there after the collection
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__.co_filename.startswith(str(SOURCE)):
            LIVING.setdefault(place_of(function.__code__), []).append(function)
    gc.freeze()  # children share this memory until they write to it


def run_pytest(tests: Iterable[str], *options: str) -> int:
    """The first failure says enough."""
    pytest = importlib.import_module("pytest")
    named = [str(TESTS / test) for test in tests]
    return int(
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--tb=short", *options, *named])
    )


def forked(jobs: Sequence[tuple[Mutation | None, Iterable[str]]]) -> list[Child]:
    """One child per job, at most `WORKERS` at once; in the order of the jobs."""
    waiting, running, done = list(enumerate(jobs)), dict[int, tuple[int, TextIOWrapper, float]](), dict[int, Child]()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            place, (mutation, tests) = waiting.pop(0)
            output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - read when it ends
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                in_child(mutation, tests, output.fileno())
            running[pid] = place, output, time.monotonic()
        time.sleep(0.05)
        for pid, (place, output, begun) in list(running.items()):
            seconds = time.monotonic() - begun
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and seconds > SECONDS * (1 if jobs[place][0] else 10):
                os.killpg(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
            if ended:
                output.seek(0)
                done[place] = Child(os.waitstatus_to_exitcode(status), output.read(), seconds)
                del running[pid]
                print(".", end="", flush=True)
    print()
    return [done[place] for place in range(len(jobs))]


def in_child(mutation: Mutation | None, tests: Iterable[str], output: int) -> None:
    """Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        if mutation is not None:
            plant(mutation)
        code = run_pytest(tests)
    finally:
        sys.stdout.flush()
        os._exit(code)


def plant(mutation: Mutation) -> None:
    """Into the module, if it is imported already; otherwise into what will be imported."""
    planted = Planted(mutation)
    if planted.name not in sys.modules:
        sys.meta_path.insert(0, planted)
        return
    for was, now in zip(*map(functions, mutation.codes()), strict=True):
        if was.replace(co_firstlineno=1) != now.replace(co_firstlineno=1):
            for function in LIVING[place_of(was)]:
                function.__code__ = now


def place_of(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def functions(code: CodeType) -> Iterator[CodeType]:
    """The functions of a module or class, in order, without functions inside functions."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from [inner] if inner.co_flags & inspect.CO_OPTIMIZED else functions(inner)


def frame(code: CodeType) -> tuple[object, ...]:
    """What is run when a module is imported, without the insides of functions."""
    inner = [
        frame(x)
        if isinstance(x, CodeType) and not x.co_flags & inspect.CO_OPTIMIZED
        else (x.co_name, x.co_freevars)
        if isinstance(x, CodeType)
        else (type(x), x)
        for x in code.co_consts
    ]
    return code.co_code, code.co_names, tuple(inner)


class Planted(importlib.abc.MetaPathFinder):
    """Finds one module with a mistake in it; all others are found as always."""

    def __init__(self, mutation: Mutation) -> None:
        path = mutation.path.relative_to(SOURCE.parent).with_suffix("")
        self.package = path.name == "__init__"
        self.name = ".".join((path.parent if self.package else path).parts)
        self.mutation = mutation

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        file = self.mutation.path
        loader, inside = Mistaken(name, file, self.mutation.source()), [str(file.parent)] if self.package else None
        return importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=inside)


class Mistaken(importlib.machinery.SourceFileLoader):
    """Loads a given text in place of the file's; no compiled copy of it is read or kept."""

    def __init__(self, name: str, file: Path, text: str) -> None:
        super().__init__(name, str(file))
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


# --- what came of it --------------------------------------------------------------------------------------------------


def say(outcomes: Iterable[Outcome]) -> None:
    for o in outcomes:
        print(f"{o.verdict}: {o.mutation.file}: {o.mutation.mistake}" + (f" ({o.why})" if o.why else ""))


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per room, and all; rates of what was tried."""
    verdicts = (KILLED, GOLDEN_ONLY, SURVIVED, STALE)
    rows: list[tuple[str, ...]] = [("room", "tried", *verdicts)]
    for room in (*sorted({o.mutation.room for o in outcomes}), "all"):
        counts = Counter(o.verdict for o in outcomes if room in (o.mutation.room, "all"))
        rows.append((room, *map(str, (counts.total(), *(counts[v] for v in verdicts)))))
    lines = ["  ".join([row[0].ljust(12), *(cell.rjust(11) for cell in row[1:])]) for row in rows]
    killed, golden = rates(outcomes)
    return "\n".join(
        [*lines, f"killed {killed:.1%} (at least {LEAST_KILLED:.0%}), of all by golden losses only {golden:.1%}"]
    )


def rates(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Shares of what was tried: killed by whatever, and by golden losses only."""
    counts = Counter(o.verdict for o in outcomes)
    total = max(counts.total(), 1)
    return (counts[KILLED] + counts[GOLDEN_ONLY]) / total, counts[GOLDEN_ONLY] / total


def enough(outcomes: Sequence[Outcome]) -> bool:
    killed, golden = rates(outcomes)
    return killed >= LEAST_KILLED and golden <= MOST_GOLDEN and not any(o.verdict == STALE for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
