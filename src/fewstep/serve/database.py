"""Where the table of jobs is: an SQLite file, or a PostgreSQL server that several machines share."""

from __future__ import annotations

import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class TableDown(Exception):
    """The table cannot be read or changed at the moment; what it has is not lost."""


class TableFull(TableDown):
    """The disk of the table is full."""


class NotUnique(ValueError):
    """A row that may be there once is there already."""


@dataclass(frozen=True)
class Rows:
    """What a command found, and how many rows it changed."""

    rows: Sequence[Sequence[Any]] = field(default_factory=tuple)
    changed: int = 0


class Database(ABC):
    """One connection, for one thread. Commands are SQL with `?` for values; each is committed when its call returns."""

    name: str
    """Where it is, without a password."""
    serial: str
    """Type of a column that numbers the rows."""
    binary: str
    """Type of a column of bytes."""

    @abstractmethod
    def run(self, command: str, *values: Any) -> Rows:
        """Follow a command. NotUnique, or TableDown where the database did not; then nothing was changed, or the change is
        there and its answer was lost."""

    @abstractmethod
    def setting_up(self) -> Any:
        """A context in which no other server makes or changes tables."""

    @abstractmethod
    def version(self) -> int:
        """Of its tables; 0: it has none."""

    @abstractmethod
    def mark(self, version: int) -> None:
        """Its tables are of this version now."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since 1970, the same for all who use this database."""

    @abstractmethod
    def close(self) -> None:
        """Give up the connection."""


class SQLite(Database):
    """A file. Several servers of one machine may use it."""

    serial = "INTEGER PRIMARY KEY AUTOINCREMENT"
    binary = "BLOB"

    def __init__(self, path: Path) -> None:
        """ValueError for a file that is no table."""
        self.name, self.path = str(path), path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last change, never the table
        except sqlite3.DatabaseError as error:
            raise unusable(self.name, error) from None

    def run(self, command: str, *values: Any) -> Rows:
        try:
            done = self._file.execute(command, values)
            return Rows(done.fetchall(), done.rowcount)
        except sqlite3.IntegrityError as error:
            raise NotUnique(str(error)) from None
        except sqlite3.OperationalError as error:
            raise (TableFull if "full" in str(error) else TableDown)(str(error)) from error

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        try:
            self._file.execute("BEGIN IMMEDIATE")
            yield
            self._file.execute("COMMIT")
        except BaseException as error:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise unusable(self.name, error) from None
            raise

    def version(self) -> int:
        return int(self._file.execute("PRAGMA user_version").fetchone()[0])

    def mark(self, version: int) -> None:
        self._file.execute(f"PRAGMA user_version = {version}")

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        self._file.close()


def without_password(url: str) -> str:
    """An address as it may be shown.

    >>> without_password("postgresql://ada:secret@db/fewstep?password=secret")
    'postgresql://ada:***@db/fewstep?password=***'
    """
    return re.sub(r"(://[^:/@?]*:)[^@]*@", r"\1***@", re.sub(r"(password=)[^&\s]*", r"\1***", url))


def unusable(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be used as a table of jobs ({error}); delete it, or give another folder")
