"""`fewstep serve` and its arguments. Nothing heavy is imported here, so that `fewstep --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Overrides, Runs


@dataclass(frozen=True)
class Serve(Runs):
    """Serve models over HTTP: videos as jobs (as OpenAI's API has them), streams of students that stream, and a page that
    shows them."""

    models: Positional[Annotated[tuple[str, ...], arg(metavar="MODEL")]] = ()
    """Models: fewstep folders, folders in diffusers' layout, hub names, or built-ins (`world`, `world/stream`). Clients ask for
    a folder by its name, or by another one: NAME=FOLDER."""
    host: str = "127.0.0.1"
    """Address to listen at. Other machines can reach 0.0.0.0; this needs --keys."""
    port: int = 8000
    """Port to listen at; 0: one that is free."""
    watch_port: int | None = None
    """Port for /health, /ready and /metrics, at the same address (default: none)."""
    keys: Path | None = None
    """File with the holders of keys and the digests of these; only they may use the server."""
    new_key: str | None = None
    """Make a key for this name, add its digest to the file of --keys, and print it. Nothing is served."""
    origin: tuple[str, ...] = ()
    """Origins of other pages that may use the server, such as https://example.com."""
    folder: Path = Path("served")
    """Folder for the table of jobs, finished videos, and snapshots of streams."""
    jobs: Annotated[str | None, arg(metavar="URL")] = None
    """Table of jobs that several servers share, with the same --folder: the path of an SQLite file (servers of one machine),
    or postgresql://USER@HOST/NAME (default: a table of this server's own, in --folder)."""
    open: bool = False
    """Open the page in a browser when the models are warm."""
    threads: int | None = None
    """Threads of the process that computes (default: all cores but one)."""
    batch: int = 1
    """Streams of one model at most whose network calls are made as one. What a viewer gets then depends on the others by
    rounding; with 1 each call is made alone, and a viewer gets the frames of `fewstep stream`, bit for bit."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import host

        return host.serve(self)
