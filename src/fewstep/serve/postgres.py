"""The table of jobs in a PostgreSQL server."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from fewstep.serve.database import Database, NotUnique, Rows, TableDown, TableFull, without_password

WAITS = 5
"""Seconds that a connection or a command may take. Requests wait for it, and frames of streams too: keep the database near."""
SYNC = 30.0
"""Seconds after which the clock of the database is read again."""
_LOCK = 0x66657773
"""Of those who make its tables: any number that others do not use."""
log = logging.getLogger(__name__)


class Postgres(Database):
    """One connection, which is made again when it was lost."""

    serial = "BIGSERIAL PRIMARY KEY"
    binary = "BYTEA"

    def __init__(self, url: str) -> None:
        """ValueError where the server cannot be reached or lets nobody in."""
        self.name, self._url = without_password(url), url
        self._clock = (0.0, float("-inf"))  # a time of the database, and of the monotonic clock here
        try:
            self._link = self._connected()
        except psycopg.Error as error:
            raise ValueError(
                f"{self.name} cannot be used as a table of jobs ({self._told(error)}); see to it that the database is there, "
                "runs, and lets this user in"
            ) from None

    def run(self, command: str, *values: Any) -> Rows:
        for again in (True, False):
            try:
                if self._link.closed:
                    self._link = self._connected()
                done = self._link.execute(command.replace("?", "%s"), values)  # type: ignore[arg-type]
                return Rows(done.fetchall() if done.description else (), done.rowcount)
            except psycopg.errors.UniqueViolation as error:
                raise NotUnique(self._told(error)) from None
            except psycopg.errors.DiskFull as error:
                raise TableFull(self._told(error)) from error
            except psycopg.Error as error:
                lost = self._link.closed or self._link.broken
                if lost:
                    self._link.close()
                if not (lost and again and command.startswith("SELECT")):  # a change might have been made
                    raise TableDown(self._told(error)) from error
        raise AssertionError

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        self.run("SELECT pg_advisory_lock(?)", _LOCK)
        try:
            yield
        finally:
            self.run("SELECT pg_advisory_unlock(?)", _LOCK)

    def version(self) -> int:
        if self.run("SELECT to_regclass('jobs_version')").rows[0][0] is None:
            return 0
        found = self.run("SELECT version FROM jobs_version").rows
        return int(found[0][0]) if found else 0

    def mark(self, version: int) -> None:
        self.run("CREATE TABLE IF NOT EXISTS jobs_version (version INTEGER NOT NULL)")
        self.run("DELETE FROM jobs_version")
        self.run("INSERT INTO jobs_version (version) VALUES (?)", version)

    def now(self) -> float:
        time_there, read = self._clock
        if time.monotonic() - read > SYNC:
            found = self.run("SELECT extract(epoch FROM clock_timestamp())::float8").rows[0][0]
            time_there, read = self._clock = float(found), time.monotonic()
        return time_there + time.monotonic() - read

    def close(self) -> None:
        self._link.close()

    def _connected(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            self._url, autocommit=True, connect_timeout=WAITS, options=f"-c statement_timeout={1000 * WAITS}",
            keepalives_idle=WAITS, tcp_user_timeout=2000 * WAITS,
        )  # fmt: skip

    @staticmethod
    def _told(error: psycopg.Error) -> str:
        """Its first line, without a password."""
        return without_password(str(error).strip().partition("\n")[0])
