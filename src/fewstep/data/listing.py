"""Which videos there are and what they show: captions.jsonl, a CSV table, or text files beside the videos."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core.build import digest
from fewstep.data.base import DataError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
VIDEO_COLUMNS = ("video", "path")
"""Names of the column that holds the file, first match wins. The text is always in `caption`."""


@dataclass(frozen=True)
class Item:
    """One captioned video. `name` is the path as listed; `path` is where the file should be."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Listing:
    """Videos that exist, in the order listed, and those that cannot be used, each with the reason."""

    items: tuple[Item, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Changes when names, captions or file sizes change; the place of the folder does not matter."""
        usable = [[item.name, item.caption, item.path.stat().st_size] for item in self.items]
        return digest([usable, sorted(map(list, self.skipped))])


def read_listing(source: str | Path) -> Listing:
    """The captioned videos of a folder, a .jsonl file or a .csv file.

    A folder is read by its `captions.jsonl` (keys `video` or `path`, and `caption`), else its `captions.csv` (columns
    of the same names), else by its video files, each with a text file of the same name beside it. Paths in a table are
    relative to it. A listed file that is absent is reported in `skipped`. DataError if the table itself is wrong.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir():
        tables = [source / "captions.jsonl", source / "captions.csv"]
        table = next((t for t in tables if t.is_file()), None)
        listing = _read_table(table) if table else _read_folder(source)
    else:
        listing = _read_table(source)
    if not listing.items:
        why = "; ".join(f"{name}: {reason}" for name, reason in listing.skipped[:3]) or "it lists nothing"
        raise DataError(f"{source}: no captioned video ({why})")
    return listing


def _read_table(table: Path) -> Listing:
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if table.suffix.lower() not in readers:
        raise DataError(f"{table}: a list of videos ends in .jsonl or .csv; or give the folder that holds the videos")
    items, skipped = [], []
    try:
        for where, row in readers[table.suffix.lower()](table):
            name = _cell(row, VIDEO_COLUMNS, where)
            item = Item(name, table.parent / name, _cell(row, ("caption",), where).strip())
            if item.path.is_file():
                items.append(item)
            else:
                skipped.append((name, f"{where} lists it, but there is no such file"))
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return Listing(tuple(items), tuple(skipped))


def _json_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"{table.name}, line {number},"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f'{where} must be an object such as {{"video": "duck.mp4", "caption": "a duck"}}')
            yield where, row


def _csv_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            yield f"{table.name}, line {reader.line_num},", row


def _cell(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str:
    """The text in the first of `columns` that the row has."""
    for column in columns:
        if column in row:
            if isinstance(row[column], str):
                return row[column]
            raise DataError(f"{where} has no text under {column!r}, but {row[column]!r}")
    have = [str(key) for key in row]
    near = [(match, column) for column in columns for match in difflib.get_close_matches(column, have, n=1)]
    hint = f"; rename {near[0][0]!r} to {near[0][1]!r}" if near else ""
    raise DataError(f"{where} has no {' or '.join(map(repr, columns))}, only {', '.join(have) or 'nothing'}{hint}")


def _read_folder(folder: Path) -> Listing:
    items, skipped = [], []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES):
        caption = path.with_suffix(".txt")
        if caption.is_file():
            items.append(Item(path.name, path, caption.read_text(encoding="utf-8-sig").strip()))
        else:
            skipped.append((path.name, f"no caption: there is no {caption.name} beside it"))
    return Listing(tuple(items), tuple(skipped))
