"""The table of jobs, which outlives its servers. Each job is made by one server at a time.

A server that makes a job has it for a while (`LEASE`), and says in time that it still makes it. A job whose server has died is
given back when that time is over.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fewstep.core.build import At, build
from fewstep.serve.database import Database, NotUnique, TableDown
from fewstep.serve.wishes import Wish

State = Literal["queued", "in_progress", "completed", "failed"]
TRIES = 2
"""How often a job is begun, if the worker or the server dies meanwhile."""
LEASE = 30.0
"""Seconds that a server has a job without saying that it still makes it."""
VERSION = 2
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number {serial}, id TEXT NOT NULL UNIQUE, holder TEXT NOT NULL, wish TEXT NOT NULL,
    state TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, begun INTEGER NOT NULL, ended DOUBLE PRECISION,
    expires DOUBLE PRECISION, code TEXT NOT NULL, message TEXT NOT NULL, picture {binary}, key TEXT, digest TEXT NOT NULL,
    {added}, UNIQUE (holder, key)
)"""
_ADDED = (
    "model TEXT NOT NULL DEFAULT ''", "server TEXT NOT NULL DEFAULT ''", "lease DOUBLE PRECISION NOT NULL DEFAULT 0",
    "done DOUBLE PRECISION NOT NULL DEFAULT 0",
)  # fmt: skip
"""Columns that version 1 had not."""
_COLUMNS = "number, id, holder, wish, state, created, begun, ended, expires, code, message, done"


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
    done: float = 0.0
    """Share that is made, as its server said last."""


class KeyReused(ValueError):
    """An idempotency key that came with another request before."""


class Jobs:
    """The table. Each change is there when its call returns; TableDown where the database cannot make it."""

    def __init__(
        self, database: Database, kept: float, clock: Callable[[], float] | None = None, lease: float = LEASE
    ) -> None:
        """Jobs that have ended are `kept` for so many seconds. ValueError for a database that has another table."""
        self._database, self._kept, self._lease = database, kept, lease
        self._clock = database.now if clock is None else clock
        self._server = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        try:
            with database.setting_up():
                self._set_up(database.version())
        except TableDown as error:
            raise ValueError(f"{database.name} cannot be used as a table of jobs ({error})") from None

    def _set_up(self, version: int) -> None:
        database = self._database
        if version not in (0, 1, VERSION):
            raise ValueError(f"{database.name} is of another version of fewstep ({version}); give another folder")
        if version == 1:
            for column in _ADDED:
                database.run(f"ALTER TABLE jobs ADD COLUMN {column}")
            for id, wish in database.run("SELECT id, wish FROM jobs").rows:
                database.run("UPDATE jobs SET model = ? WHERE id = ?", json.loads(wish)["model"], id)
        database.run(_TABLE.format(serial=database.serial, binary=database.binary, added=", ".join(_ADDED)))
        database.run("CREATE TABLE IF NOT EXISTS jobs_table (id TEXT NOT NULL)")
        if not database.run("SELECT id FROM jobs_table").rows:
            database.run("INSERT INTO jobs_table (id) VALUES (?)", secrets.token_hex(16))
        if version != VERSION:
            database.mark(VERSION)

    @property
    def table(self) -> str:
        """Tells this table from others, wherever it is."""
        return str(self._database.run("SELECT id FROM jobs_table").rows[0][0])

    def close(self) -> None:
        self._database.close()

    def add(self, holder: str, wish: Wish, *, picture: bytes | None = None, key: str | None = None) -> Job:
        """A new job, with the file of its picture. ValueError for an idempotency `key` that another job has: see `known`."""
        id, text = f"video_{secrets.token_urlsafe(18)}", json.dumps(asdict(wish))  # nobody can guess it
        digest = _digest(wish, picture)
        self.expire()
        try:
            self._database.run(
                "INSERT INTO jobs (id, holder, wish, model, state, created, begun, code, message, picture, key, digest) "
                "VALUES (?, ?, ?, ?, 'queued', ?, 0, '', '', ?, ?, ?)",
                id, holder, text, wish.model, self._clock(), picture, key, digest,
            )  # fmt: skip
        except NotUnique:
            raise ValueError(f"the key {key!r} is taken") from None
        found = self._one("id = ?", id)
        assert found is not None
        return found

    def known(self, holder: str, wish: Wish, *, picture: bytes | None = None, key: str | None = None) -> Job | None:
        """The holder's job that came with this idempotency `key`, if there is one. KeyReused where that was another request."""
        if key is None or (found := self._one("holder = ? AND key = ?", holder, key)) is None:
            return None
        rows = self._database.run("SELECT digest FROM jobs WHERE id = ?", found.id).rows
        if [tuple(row) for row in rows] != [(_digest(wish, picture),)]:
            raise KeyReused("this Idempotency-Key came with another request before; use a new one")
        return found

    def picture(self, job: Job) -> bytes | None:
        """The file of the picture that its video begins with."""
        rows = self._database.run("SELECT picture FROM jobs WHERE id = ?", job.id).rows
        return None if not rows or rows[0][0] is None else bytes(rows[0][0])

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

    def next(self, models: Collection[str] | None = None) -> Job | None:
        """The oldest job that waits, of these models (None: of any)."""
        of = "" if models is None else f" AND model IN ({', '.join('?' * len(models)) or 'NULL'})"
        return self._one(f"state = 'queued'{of} ORDER BY number LIMIT 1", *(models or ()))

    def waiting(self, before: Job | None = None) -> int:
        """Number of jobs that wait, or of those that wait `before` another one."""
        where = "" if before is None else f" AND number < {before.number}"
        return self._count(f"state = 'queued'{where}")

    def unfinished(self, holder: str) -> int:
        """Number of a holder's jobs that wait or are made."""
        return self._count("holder = ? AND state IN ('queued', 'in_progress')", holder)

    def begin(self, job: Job) -> bool:
        """This server makes it from now on. False: it was removed, or another server makes it."""
        change = "state = 'in_progress', begun = begun + 1, done = 0, server = ?, lease = ? WHERE state = 'queued' AND id = ?"
        return self._changed(change, self._server, self._clock() + self._lease, job.id) == 1

    def renew(self, job: Job, done: float) -> bool:
        """This server still makes it, and has so much of it. False: it was removed, or given to another server."""
        change = "lease = ?, done = ? WHERE state = 'in_progress' AND server = ? AND id = ?"
        return self._changed(change, self._clock() + self._lease, done, self._server, job.id) == 1

    def put_back(self, job: Job, *, counts: bool) -> bool:
        """It waits again; `counts`: what was begun counts as one of its `TRIES`."""
        change = (
            "state = 'queued', server = '', begun = begun - ? WHERE state = 'in_progress' AND server = ? AND id = ?"
        )
        return self._changed(change, 0 if counts else 1, self._server, job.id) == 1

    def complete(self, job: Job) -> bool:
        """Its video is there. False: it was removed meanwhile, or another server makes it."""
        return self._end(job, "completed", "", "")

    def fail(self, job: Job, code: str, message: str) -> bool:
        """It has failed. False: it was removed meanwhile, or another server makes it."""
        return self._end(job, "failed", code, message)

    def remove(self, job: Job) -> None:
        self._database.run("DELETE FROM jobs WHERE id = ?", job.id)

    def expire(self) -> None:
        """Remove jobs whose time is over."""
        self._database.run("DELETE FROM jobs WHERE expires <= ?", self._clock())

    def ids(self) -> frozenset[str]:
        """Of all jobs."""
        return frozenset(id for (id,) in self._database.run("SELECT id FROM jobs").rows)

    def recover(self, *, lapsed: bool = False) -> None:
        """What was being made by a server that died waits again, once; then it counts as failed. `lapsed`: of other servers,
        those alone that have not said for a lease that they still make it; else all, at the start of the only server."""
        theirs = "state = 'in_progress'" + (" AND server <> ? AND lease <= ?" if lapsed else "")
        values = (self._server, self._clock()) if lapsed else ()
        self._changed(f"state = 'queued', server = '' WHERE {theirs} AND begun < {TRIES}", *values)
        now, message = self._clock(), f"the server has stopped {TRIES} times while this was made"
        self._changed(f"{_ENDED} WHERE {theirs}", *_ended("failed", now, self._kept, "interrupted", message), *values)

    def _end(self, job: Job, state: State, code: str, message: str) -> bool:
        given = _ended(state, self._clock(), self._kept, code, message)
        return (
            self._changed(
                f"{_ENDED} WHERE ended IS NULL AND server IN ('', ?) AND id = ?", *given, self._server, job.id
            )
            == 1
        )

    def _changed(self, change: str, *values: Any) -> int:
        """Number of rows."""
        return self._database.run(f"UPDATE jobs SET {change}", *values).changed

    def _one(self, where: str, *values: Any) -> Job | None:
        return next(iter(self._all(where, *values)), None)

    def _all(self, where: str, *values: Any) -> list[Job]:
        names, now = _COLUMNS.split(", "), self._clock()
        found = self._database.run(
            f"SELECT {_COLUMNS} FROM jobs WHERE (expires IS NULL OR expires > ?) AND {where}", now, *values
        )
        made = (dict(zip(names, row, strict=True)) for row in found.rows)
        return [Job(**row | {"wish": build(Wish, json.loads(row["wish"]), {}, At("job"))}) for row in made]

    def _count(self, where: str, *values: Any) -> int:
        return int(self._database.run(f"SELECT count(*) FROM jobs WHERE {where}", *values).rows[0][0])


_ENDED = "state = ?, ended = ?, expires = ?, code = ?, message = ?, picture = NULL, server = ''"


def _ended(state: State, now: float, kept: float, code: str, message: str) -> tuple[Any, ...]:
    return state, now, now + kept, code, message


def _digest(wish: Wish, picture: bytes | None) -> str:
    """Equal for equal requests."""
    return hashlib.sha256(json.dumps(asdict(wish)).encode() + b"\0" + (picture or b"")).hexdigest()
