"""Long text files, read line by line on request."""

from __future__ import annotations

import codecs
import json
import mmap
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from fewstep.data.base import DataError


class Lines(Sequence[str]):
    """The non-blank lines of a UTF-8 file, stripped. The file may be larger than memory.

    Opening reads the file once to find where lines begin, and keeps eight bytes per line. DataError if the file is not UTF-8
    or has a NUL character.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts = array("Q")
        position = 0
        with self.path.open("rb") as file:
            for line in file:
                bom = len(codecs.BOM_UTF8) if not position and line.startswith(codecs.BOM_UTF8) else 0
                if b"\0" in line:
                    where = f"byte {position + line.index(0)}"
                    raise DataError(f"{self.path} has a NUL character ({where}), so it is not text; save it as UTF-8")
                blank = line.isspace() if line.isascii() else not self._text(line[bom:], position + bom)
                if not blank:
                    self._starts.append(position + bom)
                position += len(line)
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        return self._text(self._bytes[start : end if end >= 0 else len(self._bytes)], start)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def _text(self, line: bytes, start: int) -> str:
        try:
            return line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            where = f"byte {start + error.start}"
            raise DataError(f"{self.path}: not UTF-8 text ({where}); save it as UTF-8") from None


@dataclass(frozen=True)
class Captions:
    """The captions of all lines of an index, in order; each iteration reads the file again."""

    index: Lines

    def __iter__(self) -> Iterator[str]:
        return (json.loads(line).get("caption", "") for line in self.index)
