"""The command line: builds arguments for the library. A user's mistake gives one line and exit code 2."""

from __future__ import annotations

import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from fewstep.cli.arguments import COMMANDS, parse, split_overrides
from fewstep.cli.command import Command, UsageError

__all__ = ["COMMANDS", "main", "run"]

_MISTAKES = (ValueError, OSError)
"""Errors that a user can correct. RecipeError, DataError and StepCountError are ValueErrors."""
_BY_NAME = ("NonFiniteError", "FFmpegError", "SafetensorError")
"""More such errors, by name, because importing their modules would make `--help` slow."""
_ADVICE = {
    errno.ENOSPC: "free some disk space and run the same command again; finished files are complete",
    errno.EDQUOT: "free some disk space and run the same command again; finished files are complete",
    errno.EFBIG: "this file system, or a limit (ulimit -f), allows no larger file; write to another place",
    errno.EROFS: "give another place",
    errno.EACCES: "give another place, or get the permission to use this one",
    errno.EPERM: "give another place, or get the permission to use this one",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a part of this path is a file; give another place",
    errno.ENAMETOOLONG: "give a shorter name",
}

_READER_GONE = "the program that reads standard output has closed it; files that were written are complete"


def run() -> None:
    """The `fewstep` executable."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - None if the caller closed it, as `>&-` does
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may contain bytes that are not text
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # main has reported it; otherwise the interpreter would try again and report it twice
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    raise SystemExit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's mistake, 1 ours, 130 interrupted, 143 terminated."""
    words = [word for word in argv if word != "--traceback"]
    try:
        code = _run(words)
        sys.stdout.flush()  # an error of printing may appear only here
        return code
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich raises SystemExit if the reader has closed the pipe
            print(f"fewstep: {_READER_GONE}", file=sys.stderr)
            return 2
        return error.code if isinstance(error.code, int) else 2  # the parser has printed the error or the help
    except KeyboardInterrupt as stop:
        print(f"fewstep: stopped{f'; {stop}' if stop.args else ''}", file=sys.stderr)
        return 143 if type(stop).__name__ == "Terminated" else 130  # by name: its package imports torch
    except Exception as error:
        line = _out_of_memory(error) or (_one_line(error) if _is_mistake(error) else "")
        if "--traceback" in argv or not line:
            raise
        print(f"fewstep: {line}", file=sys.stderr)
        return 2


def _terminate(number: int, frame: FrameType | None) -> None:
    """The reaction to SIGTERM: the same as to Ctrl-C."""
    stopping = sys.modules.get("fewstep.core.stopping")
    if stopping is None:  # no command has begun
        raise SystemExit(143)
    raise stopping.Terminated


def _run(words: list[str]) -> int:
    if words == ["--version"]:
        from fewstep import __version__

        print(f"fewstep {__version__}")
        return 0
    if not words:
        parse(["--help"])
    name = words[0]
    if not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no command {name!r}.{hint} (commands: {', '.join(COMMANDS)})")
    overrides: list[tuple[str, str]] = []
    if name in COMMANDS and COMMANDS[name].takes_overrides:
        words, overrides = split_overrides(words)
    command: Command = parse(words)
    return command.run(overrides)


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, _MISTAKES) or any(cls.__name__ in _BY_NAME for cls in type(error).__mro__)


def _out_of_memory(error: Exception) -> str:
    """What to do if the memory of the machine or the device was too small; empty for other errors."""
    said = str(error).lower()
    names = [cls.__name__ for cls in type(error).__mro__]
    torchs = "RuntimeError" in names and "allocat" in said and "memory" in said
    if not (torchs or "MemoryError" in names or "OutOfMemoryError" in names):
        return ""
    which = f" ({_shortened(error)})" if said else ""
    return f"out of memory{which}: use a smaller batch, fewer frames, a smaller size or a smaller model"


def _one_line(error: Exception) -> str:
    if isinstance(error, BrokenPipeError):
        return _READER_GONE
    if isinstance(error, OSError) and error.strerror:
        where, advice = error.filename or _full_output(), _ADVICE.get(error.errno or 0)
        return f"{_cut(f'{where}: ') if where else ''}{error.strerror}{f'; {advice}' if advice else ''}"
    return " ".join(str(error).split()) or type(error).__name__


def _full_output() -> str:
    """The name of standard output if it is full. An error of printing names no file, so this tries to print an empty line."""
    try:
        print(flush=True)
    except OSError:
        return "standard output"
    return ""


def _shortened(error: Exception) -> str:
    """The first sentence of the message: torch adds a page about its allocator."""
    return " ".join(str(error).split())[:160].partition(". ")[0]


def _cut(text: str) -> str:
    """A text; if it is too long for a line, without its middle."""
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
