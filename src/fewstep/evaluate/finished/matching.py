"""Which files show the same thing: matched by name, or by a file of prompts."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.base import DataError
from fewstep.data.lines import Lines

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NAMED = 6
"""Files that an error names; it counts the others."""


@dataclass(frozen=True)
class Case:
    """One video of each side, that show the same thing."""

    name: str
    files: tuple[Path, ...]
    """One file per side."""
    prompt: str = ""


@dataclass(frozen=True)
class Matched:
    """The videos of all sides."""

    sides: tuple[str, ...]
    """The shortest names that tell the folders apart; the first is the reference."""
    cases: tuple[Case, ...]
    how: str
    """How files were matched, in words."""
    left_out: tuple[str, ...] = ()
    """One sentence per side that has files without a partner."""


def match(sides: Sequence[Path], prompt_file: Path | None = None, *, allow_missing: bool = False) -> Matched:
    """Match the videos of two or more folders, or of two or more files; the first is the reference.

    Without `prompt_file`, files match whose names are equal but for the suffix, in equal sub-folders. A table of prompts (.csv
    or .jsonl with the columns video and caption) adds prompts by name, and restricts the videos to its rows. A text file with
    one prompt per line matches by order: line i is the i-th file of each folder, where numbers in names count as numbers.

    DataError for missing or empty folders, and for files without a partner; with `allow_missing` these are left out, and
    `left_out` says so.
    """
    if len(sides) < 2:
        raise DataError(f"give two or more folders of videos, or two or more files; got {len(sides)}")
    for path in sides:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if doubled := [str(path) for path, count in Counter(path.resolve() for path in sides).items() if count > 1]:
        raise DataError(f"{doubled[0]} is given twice; give each folder once")
    names, rows = labels(sides), None if prompt_file is None else _prompts(prompt_file)
    if any(path.is_file() for path in sides):
        return _single(sides, names, rows)
    found = [_files(path) for path in sides]
    if isinstance(rows, list):
        return _by_order(sides, names, found, rows)
    return _by_name(sides, names, found, rows, allow_missing)


def labels(sides: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of the paths that differ: `a/out` and `b/out` for two folders called out."""
    parts = [path.resolve().parts for path in sides]
    for length in range(1, max(map(len, parts)) + 1):
        ends = tuple("/".join(p[-length:]) for p in parts)
        if len(set(ends)) == len(ends):
            break
    return ends


def _single(sides: Sequence[Path], names: tuple[str, ...], rows: list[str] | dict[str, str] | None) -> Matched:
    folders = [str(path) for path in sides if not path.is_file()]
    if folders:
        raise DataError(f"{folders[0]} is a folder and another one is a file; give only folders, or only files")
    for path in sides:
        if path.suffix.lower() not in VIDEOS + PICTURES:
            raise DataError(f"{path}: give a video ({', '.join(VIDEOS)}) or a picture ({', '.join(PICTURES)})")
    if isinstance(rows, list) and len(rows) != 1:
        raise DataError(f"the prompt file has {len(rows)} prompts for one video of each; write one line")
    prompt = rows[0] if isinstance(rows, list) else (rows or {}).get(sides[0].stem, "")
    return Matched(names, (Case(sides[0].stem, tuple(sides), prompt),), "the files given")


def _files(folder: Path) -> dict[str, Path]:
    """The videos and pictures of a folder by name: path below the folder, without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() not in VIDEOS + PICTURES or any(p.startswith(".") for p in below.parts):
            continue
        name = below.with_suffix("").as_posix()
        if name in found:
            raise DataError(
                f"{folder} has two files named {name}: {found[name].name} and {path.name}; keep one of them"
            )
        found[name] = path
    if not found:
        raise DataError(
            f"{folder} has no video ({', '.join(VIDEOS)}) and no picture ({', '.join(PICTURES)}); give another folder"
        )
    return found


def _by_name(
    sides: Sequence[Path], names: tuple[str, ...], found: Sequence[Mapping[str, Path]], prompts: dict[str, str] | None,
    allow_missing: bool,
) -> Matched:  # fmt: skip
    wanted = set(prompts) if prompts is not None else set().union(*found)
    shared = wanted.intersection(*found)
    problems = []
    for name, files in zip(names, found, strict=True):
        if missing := sorted(wanted - files.keys(), key=natural):
            problems.append(f"{name} lacks {_some(missing)}")
        if prompts is not None and (extra := sorted(files.keys() - wanted, key=natural)):
            problems.append(f"{name} has {_some(extra)} without a row in the prompt file")
    if not shared:
        raise DataError(
            f"no video has the same name in all folders ({'; '.join(problems)}); rename them, or give --prompt-file with one "
            "prompt per line to match them by order"
        )
    if problems and not allow_missing:
        raise DataError(
            f"the folders do not hold the same videos: {'; '.join(problems)}. Add or rename files, give --prompt-file to match "
            "them by order, or compare only the videos that all have: --allow-missing"
        )
    cases = tuple(
        Case(name, tuple(files[name] for files in found), (prompts or {}).get(name, ""))
        for name in sorted(shared, key=natural)
    )
    how = "by name" if prompts is None else "by the names in the prompt file"
    return Matched(names, cases, how, tuple(f"Left out, because a partner is missing: {p}." for p in problems))


def _by_order(
    sides: Sequence[Path], names: tuple[str, ...], found: Sequence[Mapping[str, Path]], prompts: list[str]
) -> Matched:
    counts = {name: len(files) for name, files in zip(names, found, strict=True)}
    if set(counts.values()) != {len(prompts)}:
        told = ", ".join(f"{name} has {count} files" for name, count in counts.items())
        raise DataError(
            f"the prompt file has {len(prompts)} prompts, but {told}; a text file of prompts matches by order, so give one file "
            "per line. To match by name, give a .csv or .jsonl with the columns video and caption"
        )
    ordered = [[files[name] for name in sorted(files, key=natural)] for files in found]
    own = sorted(found[0], key=natural)
    cases = tuple(Case(name, files, prompt) for name, files, prompt in zip(own, zip(*ordered), prompts, strict=True))
    return Matched(names, cases, "by order: line i of the prompt file is the i-th file of each folder")


def natural(name: str) -> list[Any]:
    """A key that sorts `a-2` before `a-10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _prompts(path: Path) -> list[str] | dict[str, str]:
    """The lines of a text file, or the captions of a table by the name of their video, without suffix."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a text file with one prompt per line, or a .csv or .jsonl table")
    lines = Lines(path)
    suffix = path.suffix.lower()
    if not len(lines):
        raise DataError(f"{path} has no prompts; write one per line")
    if suffix not in (".csv", ".jsonl"):
        return list(lines)
    rows: list[Any]
    try:
        rows = list(csv.DictReader(list(lines))) if suffix == ".csv" else [json.loads(line) for line in lines]
    except (json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table of the form {suffix[1:]}: {error}") from None
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        video, caption = (row.get(key) if isinstance(row, dict) else None for key in ("video", "caption"))
        if not isinstance(video, str) or not isinstance(caption, str) or not video:
            raise DataError(f"{path}: row {number} needs the columns video and caption")
        name = Path(video).with_suffix("").as_posix() if Path(video).suffix.lower() in VIDEOS + PICTURES else video
        if found.setdefault(name, caption) != caption:
            raise DataError(f"{path}: row {number} gives {video} another caption than a row before; keep one of them")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
