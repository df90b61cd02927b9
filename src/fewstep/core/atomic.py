"""Files and folders that are either whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of the same suffix; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name with old or no content
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty sibling of `target` that takes its place when the block ends without an error.

    A kill while the names change hands leaves what was there before beside it; `recover(target)` puts it back.
    """
    draft = draft_of(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for path in filter(Path.is_file, draft.rglob("*")):
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave the final name on files without content
    if target.exists():
        discard(target, successor=draft)
    else:
        draft.rename(target)


def draft_of(target: Path) -> Path:
    """Where `replacing_folder(target)` writes."""
    return target.with_name(f".draft-{target.name}")


def discard(folder: Path, successor: Path | None = None) -> None:
    """Delete a folder, whose name may pass to a successor; a kill half-way leaves nothing torn under that name."""
    doomed = _doomed(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    if successor is not None:
        successor.rename(folder)
    shutil.rmtree(doomed)


def recover(folder: Path) -> None:
    """Put back what a kill took away between the two renames of `replacing_folder`; nothing to do otherwise.

    For folders that are replaced and never discarded alone: only then is what lies aside whole.
    """
    if not folder.exists() and _doomed(folder).is_dir():
        _doomed(folder).rename(folder)


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".discarded-{folder.name}")
