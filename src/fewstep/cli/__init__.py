"""The command line: it builds arguments for the library, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Sequence

from fewstep.cli.arguments import COMMANDS, parse, split_overrides
from fewstep.cli.command import Command, UsageError

__all__ = ["COMMANDS", "main", "run"]

_MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What a user can put right. RecipeError, DataError and StepCountError are ValueErrors."""


def run() -> None:
    """The `fewstep` executable."""
    raise SystemExit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's mistake, 1 ours, 130 interrupted."""
    words = [word for word in argv if word != "--traceback"]
    try:
        return _run(words)
    except SystemExit as error:  # argument parsing has said what is wrong, or printed the help
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if "--traceback" in argv or not _is_mistake(error):
            raise
        print(f"fewstep: {_one_line(error)}", file=sys.stderr)
        return 2


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
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return True
    return isinstance(error, _MISTAKES) or type(error).__name__ == "NonFiniteError"  # by name: its module imports torch


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
