"""`fewstep list`."""

from __future__ import annotations

import json

from fewstep.catalogue import entries
from fewstep.cli.screen import screen, table


def show(kind: str, *, as_json: bool) -> int:
    found = entries(kind)
    if as_json:
        print(json.dumps([entry.tree() for entry in found], indent=2))
        return 0
    if kind == "recipes":
        screen().print(table(("name", "what it makes"), [(entry.name, entry.doc) for entry in found]))
        return 0
    rows = [(entry.name, entry.doc, entry.cite, f"{entry.file}:{entry.line}") for entry in found]
    screen().print(table(("name", "what it is", "source", "where"), rows))
    return 0
