"""Pages from their templates. All have one style, `base.css`; a page needs no other file for its looks."""

from __future__ import annotations

from importlib.resources import files
from string import Template

_HERE = files("fewstep.evaluate.page")


def page(template: str, **fields: str) -> str:
    """The file `template` of this room with its `$fields` filled in, which are HTML; `$base` is the common style."""
    base = (_HERE / "base.css").read_text(encoding="utf-8").rstrip()
    return Template((_HERE / template).read_text(encoding="utf-8")).substitute(base=base, **fields)
