"""Layouts of video datasets on disk: one function per layout, all with the same result."""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fewstep.core.yaml import unique_keys
from fewstep.data.base import DataError
from fewstep.data.lines import Lines
from fewstep.data.video import ClipError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
VIDEO_COLUMNS = ("video", "path")
"""Possible names of the column with the file; the first match is used. The text is always in `caption`."""

LayoutName = Literal["plain", "openvid", "webvid", "ucf101", "tars"]


@dataclass(frozen=True)
class Item:
    """One captioned video, or a `problem`: the reason why it cannot be used."""

    name: str
    """Name in the dataset."""
    path: Path
    caption: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further information from the dataset, such as class, scores or duration."""
    span: tuple[int, int] | None = None
    """First byte and number of bytes, if `path` is a tar archive that contains the video."""
    problem: str = ""

    def video(self) -> Path | BytesIO:
        """The video to decode. ClipError if the item cannot be used or its file is missing."""
        if self.problem:
            raise ClipError(self.problem)
        if not self.path.is_file():
            raise ClipError(f"no such file: {self.path}")
        if self.span is None:
            return self.path
        with self.path.open("rb") as archive:
            archive.seek(self.span[0])
            return BytesIO(archive.read(self.span[1]))


def plain(source: Path, root: Path) -> Iterator[Item]:
    """A .jsonl or .csv file (keys `video` or `path`, and `caption`), or a folder of videos.

    A folder is read from its `captions.jsonl`, else from its `captions.csv`, else from its video files, each of which has a
    text file with the same name.
    """
    tables = [source / "captions.jsonl", source / "captions.csv"] if source.is_dir() else [source]
    table = next((t for t in tables if t.is_file()), None)
    if table is None:
        yield from _folder(source)
        return
    for where, row in table_rows(table):
        yield _item(root, table_cell(row, VIDEO_COLUMNS, where), table_cell(row, ("caption",), where), row, where)


def openvid(source: Path, root: Path) -> Iterator[Item]:
    """OpenVid-1M: a CSV with `video` and `caption`, and the .mp4 files anywhere below the root, in one folder or several."""
    walked = sorted(
        os.walk(root, followlinks=True), reverse=True
    )  # if two folders have a file of one name, the first wins
    folders = {name: at for at, _, names in walked for name in names}
    for where, row in table_rows(_the_table(source)):
        name = table_cell(row, ("video",), where)
        yield _item(Path(folders.get(name, root)), name, table_cell(row, ("caption",), where), row, where)


def webvid(source: Path, root: Path) -> Iterator[Item]:
    """WebVid-10M: a CSV with `videoid`, `name` (the caption) and `page_dir`; videos at `page_dir/videoid.mp4`."""
    for where, row in table_rows(_the_table(source)):
        number, folder = (table_cell(row, (column,), where) for column in ("videoid", "page_dir"))
        name = f"{folder}/{number}.mp4" if folder and number else None
        yield _item(root, name, table_cell(row, ("name",), where), row, where)


def ucf101(source: Path, root: Path) -> Iterator[Item]:
    """UCF-101: one folder of .avi files per class; the folder's name is the caption.

    `source` is the folder with the class folders, or a list such as `trainlist01.txt`; then `root` is the folder with the
    class folders.
    """
    if source.is_dir():
        names = [p.relative_to(root).as_posix() for p in sorted(source.glob("*/*")) if p.suffix in VIDEO_SUFFIXES]
    else:
        names = [line.split()[0] for line in Lines(source)]
    for name in names:
        category = Path(name).parent.name
        if not category:
            raise DataError(f"{source}: {name!r} is not in a class folder; lines look like YoYo/v_YoYo_g01_c01.avi 101")
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category).lower()
        yield _captioned(name, root / name, words, {"class": category}, "its folder's name")


def tars(source: Path, root: Path) -> Iterator[Item]:
    """Tar archives of samples (WebDataset): the files of a sample have the same name up to the first dot.

    The caption is the sample's .txt file, or `caption` or `text` in its .json file, whose other texts and numbers become
    tags. Archives are not extracted.
    """
    archives = sorted(source.rglob("*.tar")) if source.is_dir() else [source]
    if not archives:
        raise DataError(
            f"{source} has no .tar archive; compressed archives cannot be read in place, so unpack them to .tar"
        )
    for path in archives:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        name, problem = path.name if path == source else path.relative_to(source).as_posix(), ""
        with path.open("rb") as raw:
            try:
                with tarfile.open(fileobj=raw, mode="r:") as archive:
                    for member in archive:
                        folder, _, base = member.name.rpartition("/")
                        key, _, suffix = base.partition(".")
                        if member.isfile() and base[:1] != ".":
                            samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[f".{suffix.lower()}"] = member
            except tarfile.TarError as error:
                problem = f"damaged archive: {error}"
            for key, members in samples.items():
                yield _sample(path, f"{name}/{key}", members, raw)
        if problem:
            yield Item(name, path, problem=problem)


LAYOUTS: Mapping[LayoutName, Callable[[Path, Path], Iterator[Item]]] = {
    "plain": plain, "openvid": openvid, "webvid": webvid, "ucf101": ucf101, "tars": tars,
}  # fmt: skip


def _folder(folder: Path) -> Iterator[Item]:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    if not paths and any(folder.glob("*.tar")):
        raise DataError(f"{folder} has no videos, but .tar archives; give the layout tars")
    for path in paths:
        text = path.with_suffix(".txt")
        try:
            yield _captioned(path.name, path, text.read_text(encoding="utf-8-sig"), {}, text.name)
        except FileNotFoundError:
            yield _problem(path.name, path, f"no caption: there is no {text.name} beside it")
        except UnicodeDecodeError as error:
            yield _problem(path.name, path, f"no caption: {text.name} is not UTF-8 text (byte {error.start})")


def _sample(archive: Path, name: str, members: Mapping[str, tarfile.TarInfo], raw: BinaryIO) -> Item:
    """One sample of an archive that is open as `raw`."""

    def text(suffix: str) -> str:
        raw.seek(members[suffix].offset_data)
        return raw.read(members[suffix].size).decode("utf-8-sig")

    suffix = next((s for s in VIDEO_SUFFIXES if s in members), None)
    if suffix is None:
        return Item(name, archive, problem=f"no video: the sample has only {', '.join(sorted(members))}")
    try:
        facts = json.loads(text(".json")) if ".json" in members else {}
        if not isinstance(facts, dict):
            raise ValueError("the .json file is not an object")
        caption = text(".txt") if ".txt" in members else facts.get("caption") or facts.get("text")
    except (ValueError, RecursionError) as error:
        return _problem(name + suffix, archive, f"no caption: its text cannot be read ({error})")
    item = _item(archive.parent, name + suffix, caption, facts, "its sample")
    return replace(item, path=archive, span=(members[suffix].offset_data, members[suffix].size))


def _the_table(source: Path) -> Path:
    """The CSV of a dataset: `source` itself, or the only one in that folder."""
    if source.is_file():
        return source
    tables = sorted(source.glob("*.csv"))
    if len(tables) != 1:
        have = ", ".join(table.name for table in tables) or "none"
        raise DataError(f"{source}: which .csv? It has {have}; give the file, and the folder of the videos as root")
    return tables[0]


def table_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table: each row's place in the file, for messages, and its cells by column."""
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if table.suffix.lower() not in readers:
        raise DataError(f"{table}: a list of videos ends in .jsonl or .csv; or give the folder that holds the videos")
    try:
        yield from readers[table.suffix.lower()](table)
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _json_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"{table.name}, line {number},"
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=unique_keys)
            except RecursionError:
                raise DataError(f"{where} is nested too deeply; a row is one object of texts and numbers") from None
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f'{where} must be an object such as {{"video": "duck.mp4", "caption": "a duck"}}')
            yield where, row


def _csv_rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        try:
            columns = list(reader.fieldnames or ())
            if twice := sorted({column for column in columns if columns.count(column) > 1}):
                raise DataError(f"{table.name} has the column {twice[0]!r} twice; rename or remove one")
            if any("\0" in column for column in columns):
                raise DataError(f"{table.name} has a NUL character in its header; save it as UTF-8 text")
            for row in reader:
                where = f"{table.name}, line {reader.line_num},"
                if None in row:
                    raise DataError(
                        f"{where} has {len(columns) + len(row[None])} cells, and the header {len(columns)}; put a text with "
                        'commas in double quotes, such as duck.mp4,"a duck, swimming"'
                    )
                yield where, row
        except csv.Error as error:
            raise DataError(
                f"{table.name} is not CSV after line {reader.line_num}: {error}; look for a double quote that is not closed"
            ) from None


def table_cell(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Any:
    """The cell of the first of `columns` that the row has. DataError if it has none of them."""
    for column in columns:
        if column in row:
            return row[column]
    have = [str(key) for key in row]
    near = [(match, column) for column in columns for match in difflib.get_close_matches(column, have, n=1)]
    hint = f"; rename {near[0][0]!r} to {near[0][1]!r}" if near else ""
    raise DataError(f"{where} has no {' or '.join(map(repr, columns))}, only {', '.join(have) or 'nothing'}{hint}")


def _item(folder: Path, name: Any, caption: Any, row: Mapping[str, Any], where: str) -> Item:
    """The video of a row, in `folder`, with the other cells as tags. If a cell is empty, the item has a problem."""
    if not isinstance(name, str) or not name:
        return _problem(where.rstrip(","), folder, f"no file name: {where} has {name!r}")
    others = {key: value for key, value in row.items() if isinstance(value, (str, int, float)) and value}
    tags = {_printable(key): _printable(str(value)) for key, value in others.items() if value not in (name, caption)}
    return _captioned(name, folder / name, caption, tags, where)


def _captioned(name: str, path: Path, caption: Any, tags: Mapping[str, str], where: str) -> Item:
    """A video with its caption, for all layouts. Without a caption, or with a name that is not text, it has a problem."""
    if reason := _illegible(name):
        return _problem(name, path, f"no file name: its name has {reason}; rename the file")
    if not isinstance(caption, str) or not caption.strip():
        return _problem(name, path, f"no caption: {where} has {caption!r}")
    if reason := _illegible(caption):
        return _problem(name, path, f"no caption: {where} has {reason}; write it as UTF-8 text")
    return Item(name, path, caption.strip(), tags)


def _problem(name: str, path: Path, problem: str) -> Item:
    """A video that cannot be used; its texts are made printable."""
    return Item(_printable(name), Path(_printable(str(path))), problem=_printable(problem))


def _illegible(text: str) -> str:
    """Why a string is not valid text; empty if it is."""
    if "\0" in text:
        return "a NUL character"
    return "" if _printable(text) == text else "bytes that are not UTF-8, or half a character"


def _printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot hold: bytes of file names in another encoding, lone surrogates in JSON."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
