"""Check the project's limits: sizes, prints, environment variables, bad numbers, file names.

Run `python tools/budgets.py` in the repository; it lists the offenders and exits 1 if there are any. An exception that
is no longer needed is an offence too: the list of exceptions only shrinks.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, NETWORK_FILE_LINES, METHOD_FILE_LINES = 400, 600, 150
FUNCTION_LINES, PARAMETERS = 60, 7
SUPPORT = {  # files of a room that are not one of its algorithms, and may hold several classes that belong together
    "methods": {
        "__init__",
        "adversary",
        "base",
        "frames",
        "gan",
        "grids",
        "motion",
        "recycling",
        "rewards",
        "roles",
        "targets",
        "turns",
        "underway",
    },
    "attention": {
        "__init__",
        "forward_mode",
        "pattern",
        "kernels",
        "delta_rule",
        "cache",
        "choosing",
        "slots",
        "standing",
    },
    "caching": {"__init__", "base"},
    "diffusion/samplers": {"__init__", "base"},
    "models": {"__init__", "bundle", "source", "spec"},  # no networks in them
    "models/adapters": {"__init__", "joint", "streams", "unet", "chunks", "pipeline"},
}
NUMBERED = {
    "avdm2",
    "dmd2",
    "dpmpp_2m",
    "int8",
    "t5",
    "hunyuan15",
    "qwen_byt5",
    "hyper_sd15",
    "lcm_lora_sd15",
    "rcm_wan21",
}  # what the field calls it
BANNED_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
NEVER = {"nan_to_num": "bad numbers are never hidden", "eval": "text is never run", "exec": "text is never run"}
PLAIN_CALLS = {"eval", "exec", "print"}  # model.eval() is something else

EXCEPTIONS: dict[str, str] = {
    # "<path>:<rule>" or "<path>:<function>:<rule>" -> why, and what would remove it
    "src/fewstep/models/video_dit.py:__init__:parameters": "a network's constructor names every size",
    "src/fewstep/engine/loop.py:complete:parameters": "the front door of the engine",
    "src/fewstep/data/prepare.py:prepare:parameters": "the front door of preparation",
    "src/fewstep/attention/forward_mode.py:_attend:parameters": "those of torch's own attention, and how much at a time",
}


@dataclass(frozen=True)
class Offence:
    key: str
    path: str
    line: int
    text: str


def main() -> int:
    offences = [o for path in sorted((ROOT / "src").rglob("*.py")) for o in check(path)]
    kept = [o for o in offences if o.key not in EXCEPTIONS]
    stale = sorted(EXCEPTIONS.keys() - {o.key for o in offences})
    for o in kept:
        print(f"{o.path}:{o.line}: {o.text}  [{o.key}]")
    for key in stale:
        print(f"tools/budgets.py: the exception {key!r} is not needed any more; remove it")
    return 1 if kept or stale else 0


def check(path: Path, root: Path = ROOT) -> Iterator[Offence]:
    """Offences of one file."""
    name = path.relative_to(root).as_posix()
    source = path.read_text(encoding="utf-8")
    lines, limit = source.count("\n"), file_limit(name)
    if lines > limit:
        yield Offence(f"{name}:lines", name, lines, f"{lines} lines, at most {limit}")
    if path.stem in BANNED_NAMES or (path.stem[-1:].isdigit() and path.stem not in NUMBERED):
        yield Offence(f"{name}:name", name, 1, f"{path.name}: a file is named after what it holds")
    tree = ast.parse(source)
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    one = is_one_of(name, "methods", "attention", "caching", "diffusion/samplers") and len(classes) != 1
    if one or (is_one_of(name, "models/adapters") and len(classes) > 1):
        text = f"one public class per method, pattern, policy or adapter file, here: {', '.join(classes) or 'none'}"
        yield Offence(f"{name}:classes", name, 1, text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from check_function(name, node)
        else:
            yield from check_words(name, node)


def file_limit(name: str) -> int:
    if is_one_of(name, "methods"):
        return METHOD_FILE_LINES
    return NETWORK_FILE_LINES if is_one_of(name, "models") else FILE_LINES


def is_one_of(name: str, *rooms: str) -> bool:
    """Whether a file is one of the algorithms or networks of these rooms, and not one that serves them."""
    folder, _, file = name.removeprefix("src/fewstep/").rpartition("/")
    inside = [room for room in rooms if f"{folder}/".startswith(f"{room}/")]
    return any(file.removesuffix(".py") not in SUPPORT[room] for room in inside)


def check_function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Offence]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > FUNCTION_LINES:
        yield Offence(
            f"{name}:{node.name}:lines", name, node.lineno, f"{node.name}: {length} lines, at most {FUNCTION_LINES}"
        )
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len([a for a in named if a not in ("self", "cls")])
    if count > PARAMETERS:
        text = f"{node.name}: {count} parameters, at most {PARAMETERS}"
        yield Offence(f"{name}:{node.name}:parameters", name, node.lineno, text)


def check_words(name: str, node: ast.AST) -> Iterator[Offence]:
    if isinstance(node, ast.Call):
        called = node.func
        plain = called.id if isinstance(called, ast.Name) else ""
        word = called.attr if isinstance(called, ast.Attribute) else plain
        if word in NEVER and (plain or word not in PLAIN_CALLS):
            yield Offence(f"{name}:{word}", name, node.lineno, f"{word}: {NEVER[word]}")
        if plain == "print" and not name.startswith("src/fewstep/cli"):
            yield Offence(f"{name}:print", name, node.lineno, "print outside the command line")
    reads = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    if reads and name != "src/fewstep/core/env.py":
        line = getattr(node, "lineno", 1)
        yield Offence(f"{name}:environ", name, line, "the environment is read in core/env.py only")
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        yield Offence(f"{name}:except", name, node.lineno, "a bare except hides bugs")


if __name__ == "__main__":
    sys.exit(main())
