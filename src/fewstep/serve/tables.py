"""Which table of jobs belongs to a folder: files of clips that no job has are deleted, so that the two must not be confused."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from fewstep.core.atomic import write_text
from fewstep.core.lock import holding
from fewstep.serve.database import Database, SQLite, without_password
from fewstep.serve.jobs import Jobs

OWN = "jobs.sqlite"
"""Table of the only server of a folder."""
SHARED = "jobs.table"
"""Which shared table the folder belongs to."""


def open_database(url: str) -> Database:
    """The database of `sqlite:///PATH`, a path, or `postgresql://...`. ValueError where there is none."""
    scheme, _, rest = url.partition("://")
    if not rest:
        return SQLite(Path(url).expanduser())
    if scheme == "sqlite" and rest.startswith("/"):
        return SQLite(Path(rest[1:]).expanduser())
    if scheme not in ("postgresql", "postgres"):
        raise ValueError(f"{without_password(url)}: give the path of an SQLite file, or postgresql://USER@HOST/NAME")
    try:
        from fewstep.serve.postgres import Postgres
    except ModuleNotFoundError as error:
        if str(error.name).startswith("fewstep"):
            raise
        raise ValueError(
            f'a table of jobs in PostgreSQL needs the package {error.name}; install it: pip install "fewstep[postgres]"'
        ) from None
    return Postgres(url)


def table_of(folder: Path, shared: str | None, kept: float) -> Jobs:
    """The table of a folder: its own, or a `shared` one. ValueError for a folder that belongs to another table."""
    own, mark = folder / OWN, folder / SHARED
    if shared is None:
        if mark.exists():
            raise ValueError(
                f"{folder} has the videos of a table of jobs that several servers share; give that one by --jobs, or another "
                "--folder"
            )
        return Jobs(SQLite(own), kept)
    database = open_database(shared)
    itself = isinstance(database, SQLite) and database.path.resolve() == own.resolve()
    if own.exists() and not itself:
        raise ValueError(f"{folder} has a table of jobs of its own; give another --folder, or --jobs {own}")
    jobs = Jobs(database, kept)
    if not mark.exists():
        with holding(folder):  # of a server that has it for itself
            write_text(mark, f"{jobs.table}\n")
    if mark.read_text(encoding="utf-8").strip() != jobs.table:
        raise ValueError(
            f"{folder} has the videos of another table of jobs than {database.name}; give another --folder"
        )
    return jobs


def alone(folder: Path, shared: str | None) -> AbstractContextManager[None]:
    """Keep other servers out of a folder that is not shared. FolderInUse where one has it."""
    return holding(folder) if shared is None else contextlib.nullcontext()
