"""Print the slowest tests and what each one guards.

    pytest -m "not slow" --save-durations costs.json
    python tools/slowest.py costs.json              the twenty slowest
    python tools/slowest.py costs.json --files      by file

Costs are CPU-seconds, so that they mean the same on a busy machine. A test whose cost is above LIMIT belongs among the
slow ones (`@pytest.mark.slow`), or wants to be smaller.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 5.0
"""CPU-seconds of a quick test."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the slowest tests and what each guards.")
    parser.add_argument("file", type=Path, help="what pytest --save-durations FILE wrote")
    parser.add_argument("--count", type=int, default=20, help="tests to print (default: 20)")
    parser.add_argument("--files", action="store_true", help="add up by file instead")
    options = parser.parse_args(argv)
    costs: dict[str, float] = json.loads(options.file.read_text(encoding="utf-8"))
    total = sum(costs.values())
    print(f"{len(costs)} tests, {total:.0f} CPU-seconds; {above(costs)} take more than {LIMIT:g}")
    shown = costs
    if options.files:
        shown = defaultdict(float)
        for test, seconds in costs.items():
            shown[test.partition("::")[0]] += seconds
    for name, seconds in sorted(shown.items(), key=lambda item: -item[1])[: options.count]:
        print(f"{seconds:8.2f} s {100 * seconds / total:5.1f} %  {name}")
        if not options.files:
            print(f"{'':19}guards: {guards(name)}")
    return 0


def above(costs: dict[str, float]) -> int:
    return sum(seconds > LIMIT for seconds in costs.values())


def guards(test: str) -> str:
    """What a test guards: the first sentence of its docstring, or its name in words."""
    file, _, name = test.partition("::")
    name = name.partition("[")[0].split("::")[-1]
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name and ast.get_docstring(node):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            return re.split(r"(?<=[.!])\s", text, maxsplit=1)[0].rstrip(".")
    return name.removeprefix("test_").replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())
