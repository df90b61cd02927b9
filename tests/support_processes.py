"""A command or a function in several processes, as torchrun starts them, but forked from one that has imported everything.

Importing torch and diffusers takes longer than what most tests run. Where restarts matter, torchrun's own agent starts the
processes (`restarted`); torchrun as a program is left to a slow test of test_engine_parallel.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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


def together(processes: int, folder: Path, target: Callable[..., object], *arguments: object) -> None:
    """Call `target` in so many processes, which meet as under torchrun. AssertionError with what a failed one wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"process{rank}.log" for rank in range(processes)]
    started = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(forked().Process(target=_placed, args=(place, log, target, arguments)))
        started[-1].start()
    for process in started:
        process.join()
    for process, log in zip(started, logs):
        assert process.exitcode == 0, log.read_text()[-4000:]


def restarted(
    processes: int, folder: Path, target: Callable[..., object], *arguments: object, restarts: int = 0
) -> str:
    """As `together`, but torchrun's agent starts the processes, all anew after one has died; what went wrong, or nothing."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=folder.name, rdzv_backend="c10d", max_restarts=restarts,
        rdzv_endpoint="localhost:0", start_method=forked().get_start_method(), signals_to_handle="",
        logs_specs=DefaultLogsSpecs(str(folder / "logs"), redirects=Std.ALL),
    )  # fmt: skip
    try:
        with patch.dict(os.environ):
            elastic_launch(config, _called)(target, arguments)
    except ChildFailedError as failed:
        return str(failed) + "".join(log.read_text() for log in (folder / "logs").rglob("stderr.log"))
    return ""


def run(processes: int, folder: Path, *words: object) -> None:
    """Run one command in so many processes."""
    together(processes, folder, _command, [str(word) for word in words])


def _placed(place: dict[str, object], log: Path, target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            _called(target, arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _called(target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    target(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def _command(words: list[str]) -> None:
    if code := main(words):
        sys.exit(code)
