"""A `fewstep` command in several processes, as torchrun starts them, but forked from one that has imported everything.

Importing torch and diffusers takes longer than what most tests run. That torchrun itself starts and restarts the processes is
tested where that matters, in test_engine_parallel.py, test_data_processes.py and test_data_pairs.py.
"""

from __future__ import annotations

import os
import socket
import sys
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

import torch

from fewstep.cli import main


def forked() -> ForkServerContext:
    """Processes of this context share one import of torch, of what tests share, and of diffusers where it is installed."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["support_engine", "tiny_models", "fewstep.recipe"])
    with patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join(sys.path)
    ):  # it is not told otherwise, and ignores what it lacks
        forkserver.ensure_running()
    return context


def run(processes: int, folder: Path, *words: object) -> None:
    """Run one command in so many processes, which meet as under torchrun. AssertionError with what a failed one wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"process{rank}.log" for rank in range(processes)]
    started = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(forked().Process(target=_command, args=(place, log, [str(word) for word in words])))
        started[-1].start()
    for process in started:
        process.join()
    for process, log in zip(started, logs):
        assert process.exitcode == 0, log.read_text()[-2000:]


def _command(place: dict[str, object], log: Path, words: list[str]) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
