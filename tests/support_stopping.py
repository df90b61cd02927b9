"""A command that sends itself a signal at a fixed moment: `python support_stopping.py WHERE NUMBER SIGNAL WORDS...`.

No clock decides what is tested: the signal comes with call NUMBER of what makes up the moment WHERE. Under torchrun the last
process sends it: `SIGTERM` to itself alone, `SIGTERM@torchrun` to torchrun, which sends it to all.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from fewstep.core.env import place

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
            send(name)
        return real(*args, **options)

    setattr(thing, method, fatal)


def send(name: str) -> None:
    here, (name, _, torchrun) = place(), name.partition("@")
    if here.rank < here.world_size - 1:
        return
    if not torchrun:
        os.kill(os.getpid(), getattr(signal, name))
        return
    came, answer = [], signal.getsignal(number := getattr(signal, name))
    signal.signal(number, lambda *what: (came.append(what), answer(*what)))  # type: ignore[operator]
    os.kill(os.getppid(), number)
    while not came:  # the iteration does not end before torchrun has sent it
        time.sleep(0.01)


def fewstep(*words: object, here: Path, at: tuple[str, int, str] | None = None, processes: int = 1) -> tuple[int, str]:
    """A command in a process of its own, or under torchrun; its exit code and what it said on standard error."""
    command = [sys.executable]
    if processes > 1:
        options = ["--standalone", f"--nproc-per-node={processes}", "--monitor-interval=0.1"]
        command += ["-m", "torch.distributed.run", *options]
    command += ["-m", "fewstep"] if at is None else [__file__, *map(str, at)]
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script runs in the background
    run()
