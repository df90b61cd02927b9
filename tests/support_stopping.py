"""A command that sends itself a signal at a fixed moment: `python support_stopping.py WHERE NUMBER SIGNAL WORDS...`.

No clock decides what is tested: the signal comes with call NUMBER of what makes up the moment WHERE.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

MOMENTS = {
    "iteration": ("fewstep.engine.run", "Run", "iterate"),
    "shard": ("fewstep.data.store", "ShardWriter", "_flush"),
    "row": ("fewstep.data.store", "ShardWriter", "add"),
    "batch": ("fewstep.evaluate.measure", "Meter", "add"),
    "film": ("fewstep.models.bundle", "VideoModel", "latents"),
}


def signalling(where: str, number: int, name: str) -> None:
    module, owner, method = MOMENTS[where]
    thing: Any = getattr(importlib.import_module(module), owner)
    real, calls = getattr(thing, method), count(1)

    def fatal(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), getattr(signal, name))
        return real(*args, **options)

    setattr(thing, method, fatal)


def fewstep(*words: object, here: Path, at: tuple[str, int, str] | None = None) -> tuple[int, str]:
    """A command in a process of its own; its exit code and what it said on standard error."""
    command = [sys.executable, "-m", "fewstep"] if at is None else [sys.executable, __file__, *map(str, at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [*command, *map(str, words)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, " ".join(done.stderr.split())


if __name__ == "__main__":
    from fewstep.cli import run

    where, number, name, *words = sys.argv[1:]
    signalling(where, int(number), name)
    sys.argv[1:] = words
    run()
