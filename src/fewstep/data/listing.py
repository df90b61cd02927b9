"""The list of a dataset's videos, made by its layout and stored as a file, which is read in place."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.data.base import DataError
from fewstep.data.layouts import LAYOUTS, Item, LayoutName
from fewstep.data.lines import Captions, Lines
from fewstep.data.store import writing

LISTING = "listing.jsonl"
log = logging.getLogger(__name__)


class Listing:
    """The items of a file from `write_listing`, read on request: the file may be larger than memory."""

    def __init__(self, file: str | Path, root: str | Path) -> None:
        self.lines, self.root = Lines(file), Path(root)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def captions(self) -> Captions:
        return Captions(self.lines)

    def __getitem__(self, index: int) -> Item:
        row: dict[str, Any] = json.loads(self.lines[index])
        span = tuple(row["span"]) if "span" in row else None
        return Item(**{**row, "path": self.root / row["path"], "span": span})


def open_listing(
    source: str | Path, layout: LayoutName = "plain", root: str | Path = "", file: str | Path = ""
) -> Listing:
    """The items of a dataset, read on request. `file` stores them; it is written if it does not exist.

    Without `file`, the list is made each time, in a temporary file. DataError as in `read_listing`.
    """
    if file:
        return (
            Listing(file, root_of(source, root))
            if Path(file).is_file()
            else write_listing(Path(file), source, layout, root)
        )
    with tempfile.TemporaryDirectory(
        prefix="fewstep-"
    ) as folder:  # the file stays mapped into memory after its deletion
        return write_listing(Path(folder) / LISTING, source, layout, root)


def check_listing(source: str | Path, layout: LayoutName = "plain", root: str | Path = "") -> None:
    """DataError if `source` does not have this layout. Reads up to the first usable video."""
    next(item for item in _usable(source, layout, root_of(source, root)) if not item.problem)


def write_listing(file: Path, source: str | Path, layout: LayoutName = "plain", root: str | Path = "") -> Listing:
    """Write the items of `read_listing` to `file`, one by one. The file does not contain the dataset's location."""
    folder = root_of(source, root)
    within = f"{folder}{os.sep}"
    seen: dict[int, int] = {}
    """Hash of each video's name to the hash of its caption, because the names may need too much memory."""
    again, example = 0, ""
    with writing(file) as draft, draft.open("w", encoding="utf-8") as lines:
        for item in _usable(source, layout, folder):
            if not item.problem and seen.setdefault(hash(item.name), hash(item.caption)) != hash(item.caption):
                again, example = again + 1, item.name
            row = {key: value for key, value in vars(item).items() if value}
            row["path"] = str(item.path).removeprefix(within)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    if again:
        log.warning(
            "%d rows give a different caption to a video of an earlier row (such as %s); all rows are used",
            again,
            example,
        )
    return Listing(file, folder)


def read_listing(source: str | Path, layout: LayoutName = "plain", root: str | Path = "") -> tuple[Item, ...]:
    """The videos of a dataset, in its order.

    `layout` is a key of `LAYOUTS`; `root` is the folder that video names are relative to (default: `source`, or the folder
    that contains it). The video files themselves are not checked: `Item.video` does that. DataError if `source` does not have
    this layout, or has no captioned video.
    """
    return tuple(_usable(source, layout, root_of(source, root)))


def root_of(source: str | Path, root: str | Path = "") -> Path:
    """The folder that a dataset's video names are relative to."""
    source = Path(source)
    return Path(root) if str(root) else source if source.is_dir() else source.parent


def _usable(source: str | Path, layout: LayoutName, root: Path) -> Iterator[Item]:
    """The items that the layout finds; DataError at the end if none can be used."""
    source, usable = Path(source), 0
    problems: list[str] = []
    if layout not in LAYOUTS:
        raise DataError(f"there is no layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    for place in (source, root):
        if not place.exists():
            raise DataError(f"{place}: no such file or folder")
    for item in LAYOUTS[layout](source, root):
        usable += not item.problem
        if item.problem and len(problems) < 3:
            problems.append(f"{item.name}: {item.problem}")
        yield item
    if not usable:
        found = "; ".join(problems) or "it lists nothing"
        raise DataError(
            f"{source}: no captioned video ({found}). Check that its layout is {layout!r}, or give another one: "
            f"{', '.join(LAYOUTS)}"
        )
