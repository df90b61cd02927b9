"""The table of jobs: one SQLite file, which outlives the server."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.core.build import At, build
from fewstep.serve.wishes import Wish

State = Literal["queued", "in_progress", "completed", "failed"]
TRIES = 2
"""How often a job is begun, if the worker or the server dies meanwhile."""
VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, holder TEXT NOT NULL, wish TEXT NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL, begun INTEGER NOT NULL, ended REAL, expires REAL,
    code TEXT NOT NULL, message TEXT NOT NULL, picture BLOB, key TEXT, digest TEXT NOT NULL, UNIQUE (holder, key)
)"""
_COLUMNS = "number, id, holder, wish, state, created, begun, ended, expires, code, message"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip that somebody asked for. Times in seconds since 1970."""

    number: int
    """Jobs are made in this order, whatever the clock says."""
    id: str
    holder: str
    """Whose it is. To others it is not there."""
    wish: Wish
    state: State
    created: float
    begun: int
    """How often it was begun."""
    ended: float | None
    expires: float | None
    """When it and its video are deleted."""
    code: str
    message: str
    """Why it failed."""


class KeyReused(ValueError):
    """An idempotency key that came with another request before."""


class Jobs:
    """The table. Each change is in the file when its call returns; sqlite3.OperationalError where the disk is full."""

    def __init__(self, path: Path, kept: float, clock: Callable[[], float] = time.time) -> None:
        """Jobs that have ended are `kept` for so many seconds. ValueError for a file that is no such table."""
        self._kept, self._clock = kept, clock
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last change, never the table
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise ValueError(f"{path} is of another version of fewstep ({version}); give another folder")
            self._file.execute(_TABLE)
            self._file.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path} cannot be used as a table of jobs ({error}); delete it, or give another folder"
            ) from None

    def close(self) -> None:
        self._file.close()

    def add(self, holder: str, wish: Wish, *, picture: bytes | None = None, key: str | None = None) -> Job:
        """A new job, with the file of its picture. ValueError for an idempotency `key` that another job has: see `known`."""
        id, text = f"video_{secrets.token_urlsafe(18)}", json.dumps(asdict(wish))  # nobody can guess it
        digest = _digest(wish, picture)
        self.expire()
        try:
            self._file.execute(
                "INSERT INTO jobs (id, holder, wish, state, created, begun, code, message, picture, key, digest) "
                "VALUES (?, ?, ?, 'queued', ?, 0, '', '', ?, ?, ?)",
                (id, holder, text, self._clock(), picture, key, digest),
            )
        except sqlite3.IntegrityError:
            raise ValueError(f"the key {key!r} is taken") from None
        found = self._one("id = ?", id)
        assert found is not None
        return found

    def known(self, holder: str, wish: Wish, *, picture: bytes | None = None, key: str | None = None) -> Job | None:
        """The holder's job that came with this idempotency `key`, if there is one. KeyReused where that was another request."""
        if key is None or (found := self._one("holder = ? AND key = ?", holder, key)) is None:
            return None
        (before,) = self._file.execute("SELECT digest FROM jobs WHERE id = ?", (found.id,)).fetchone()
        if before != _digest(wish, picture):
            raise KeyReused("this Idempotency-Key came with another request before; use a new one")
        return found

    def picture(self, job: Job) -> bytes | None:
        """The file of the picture that its video begins with."""
        row = self._file.execute("SELECT picture FROM jobs WHERE id = ?", (job.id,)).fetchone()
        return None if row is None else row[0]

    def get(self, id: str, holder: str | None = None) -> Job | None:
        """A job, if it is the `holder`'s (None: anybody's)."""
        job = self._one("id = ?", id)
        return job if job is not None and holder in (None, job.holder) else None

    def page(self, holder: str, *, after: Job | None, limit: int, newest: bool) -> tuple[list[Job], bool]:
        """Some jobs of a holder, and whether there are more; `newest` first, or oldest first."""
        order, compare = ("DESC", "<") if newest else ("ASC", ">")
        begin = "1" if after is None else f"number {compare} {after.number}"
        rows = self._all(f"holder = ? AND {begin} ORDER BY number {order} LIMIT {limit + 1}", holder)
        return rows[:limit], len(rows) > limit

    def next(self) -> Job | None:
        """The oldest job that waits."""
        return self._one("state = 'queued' ORDER BY number LIMIT 1")

    def waiting(self, before: Job | None = None) -> int:
        """Number of jobs that wait, or of those that wait `before` another one."""
        where = "" if before is None else f" AND number < {before.number}"
        return self._count(f"state = 'queued'{where}")

    def unfinished(self, holder: str) -> int:
        """Number of a holder's jobs that wait or are made."""
        return self._count("holder = ? AND state IN ('queued', 'in_progress')", holder)

    def begin(self, job: Job) -> bool:
        """It is being made. False: it was removed meanwhile."""
        return self._set(job, "state = 'in_progress', begun = begun + 1")

    def put_back(self, job: Job, *, counts: bool) -> bool:
        """It waits again; `counts`: what was begun counts as one of its `TRIES`."""
        change = "state = 'queued', begun = begun - ? WHERE state = 'in_progress' AND id = ?"
        return self._file.execute(f"UPDATE jobs SET {change}", (0 if counts else 1, job.id)).rowcount == 1

    def complete(self, job: Job) -> bool:
        """Its video is there. False: it was removed meanwhile."""
        return self._end(job, "completed", "", "")

    def fail(self, job: Job, code: str, message: str) -> bool:
        """It has failed. False: it was removed meanwhile."""
        return self._end(job, "failed", code, message)

    def remove(self, job: Job) -> None:
        self._file.execute("DELETE FROM jobs WHERE id = ?", (job.id,))

    def expire(self) -> None:
        """Remove jobs whose time is over."""
        self._file.execute("DELETE FROM jobs WHERE expires <= ?", (self._clock(),))

    def ids(self) -> frozenset[str]:
        """Of all jobs."""
        return frozenset(id for (id,) in self._file.execute("SELECT id FROM jobs"))

    def recover(self) -> None:
        """At the start of a server: what was being made when the last one died waits again, once; then it counts as failed."""
        for job in self._all("state = 'in_progress'"):
            if job.begun < TRIES:
                self.put_back(job, counts=True)
            else:
                self.fail(job, "interrupted", f"the server has stopped {TRIES} times while this was made")

    def _end(self, job: Job, state: State, code: str, message: str) -> bool:
        now = self._clock()
        change = "state = ?, ended = ?, expires = ?, code = ?, message = ?, picture = NULL"
        return self._set(job, change, state, now, now + self._kept, code, message)

    def _set(self, job: Job, change: str, *values: Any) -> bool:
        return self._file.execute(f"UPDATE jobs SET {change} WHERE id = ?", (*values, job.id)).rowcount == 1

    def _one(self, where: str, *values: Any) -> Job | None:
        return next(iter(self._all(where, *values)), None)

    def _all(self, where: str, *values: Any) -> list[Job]:
        names, now = _COLUMNS.split(", "), self._clock()
        rows = self._file.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE (expires IS NULL OR expires > ?) AND {where}", (now, *values)
        )
        made = (dict(zip(names, row, strict=True)) for row in rows.fetchall())
        return [Job(**row | {"wish": build(Wish, json.loads(row["wish"]), {}, At("job"))}) for row in made]

    def _count(self, where: str, *values: Any) -> int:
        (count,) = self._file.execute(f"SELECT count(*) FROM jobs WHERE {where}", values).fetchone()
        return int(count)


def _digest(wish: Wish, picture: bytes | None) -> str:
    """Equal for equal requests."""
    return hashlib.sha256(json.dumps(asdict(wish)).encode() + b"\0" + (picture or b"")).hexdigest()
