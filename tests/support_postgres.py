"""A PostgreSQL server of its own for a test module, where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    """It listens to this machine."""

    folder: Path
    port: int
    programs: Path
    user: str | None
    """Who runs it, where root may not."""

    @property
    def url(self) -> str:
        return f"postgresql://fewstep:secret@127.0.0.1:{self.port}/postgres"

    def control(self, *words: str) -> None:
        """pg_ctl."""
        command = [
            str(self.programs / "pg_ctl"),
            "-D",
            str(self.folder / "data"),
            "-w",
            "-l",
            str(self.folder / "log"),
            *words,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60, user=self.user, cwd=self.folder)

    def start(self) -> None:
        self.control("-o", f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off", "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "stop")


def why_not() -> str:
    """Why there is no server here; empty: there is one."""
    if _programs() is None:
        return "needs PostgreSQL (initdb, pg_ctl)"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return ""


@contextmanager
def running() -> Iterator[Server]:
    """An empty server until the block ends."""
    programs, user = _programs(), _user() if os.geteuid() == 0 else None
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="fewstep-postgres-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(folder, free.getsockname()[1], programs, user)
    if user is not None:
        shutil.chown(folder, user)
    command = [str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "fewstep", "-N"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120, user=user, cwd=folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "pg_ctl").is_file()), None)


def _user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)
