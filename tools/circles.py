"""Find import cycles inside a room.

Run `python tools/circles.py` in the repository; it lists the circles and exits 1 if there are any. What is imported for
types only closes no circle. The list of known circles only shrinks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
KNOWN: dict[str, str] = {}
"""`<room>: <modules>` of a circle -> why it is there, and what would remove it."""


def main() -> int:
    sys.path.insert(0, str(ROOT / "src"))
    graph = grimp.build_graph("fewstep", exclude_type_checking_imports=True, cache_dir=None)
    found = set(circles(graph, "fewstep"))
    for circle in sorted(found - KNOWN.keys()):
        print(f"{circle} import each other; let one of them know nothing of the others")
    for circle in sorted(KNOWN.keys() - found):
        print(f"tools/circles.py: {circle!r} is no circle any more; remove it from the list")
    return 1 if found ^ KNOWN.keys() else 0


def circles(graph: grimp.ImportGraph, room: str) -> Iterator[str]:
    """Circles of imports between the parts of `room`, and between the parts of its sub-rooms."""
    parts = sorted(graph.find_children(room))
    owner = {module: part for part in parts for module in (part, *graph.find_descendants(part))}
    reads = {
        part: {owner[read] for read in _read(graph, part) if read in owner and owner[read] != part} for part in parts
    }
    reach = {part: _reached(reads, part) for part in parts}
    alike = {frozenset(other for other in reach[part] if part in reach[other]) for part in parts if part in reach[part]}
    for circle in alike:
        yield f"{room}: {', '.join(sorted(part.rpartition('.')[2] for part in circle))}"
    for part in parts:
        yield from circles(graph, part)


def _read(graph: grimp.ImportGraph, part: str) -> Iterator[str]:
    for module in (part, *graph.find_descendants(part)):
        yield from graph.find_modules_directly_imported_by(module)


def _reached(reads: Mapping[str, set[str]], start: str) -> set[str]:
    """All that `start` reads, directly or not; itself only in a circle."""
    seen: set[str] = set()
    waiting = [*reads[start]]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            waiting += reads[part]
    return seen


if __name__ == "__main__":
    sys.exit(main())
