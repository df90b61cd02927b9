"""A server under load: streams that come at random, as many as there is room for and twice as many.

    python bench/serve.py
    python bench/serve.py --model runs/mine/student --seconds 60
    python bench/serve.py --soak 480     # eight hours of viewers who steer and leave: threads, files and memory must not grow

For each number of viewers: from a viewer's `init` to its first frames, how late later chunks are for a player that began with
the first one, and what became of viewers that there was no room for. The declared objective: 99 % of the first chunks of those
who are admitted at once within 1 s, and 99 % of the later ones at most 0.25 s late. Last, frames per second of one viewer who
takes all that there is, over those of the same student without a server (`model.stream`, as many threads).
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from websockets.asyncio.client import connect

from fewstep.models import VideoModel
from measuring import rounded, show
from soaking import soak

SERVER = """
import asyncio, sys
from pathlib import Path
from fewstep.serve.app import Server
from fewstep.serve.limits import Limits
from fewstep.serve.running import run
from fewstep.serve.worker import Served

model, folder, threads = sys.argv[1:]
served = Served(models=((model, model),), threads=int(threads))
server = Server(served, limits=Limits(streams=10_000), folder=Path(folder))
asyncio.run(run(server, "127.0.0.1", 0, None, lambda address: print(address, flush=True)))
"""
"""`fewstep serve`, with as many streams for one holder as there is room for."""
FIRST, LATE = 1.0, 0.25
"""The objective, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One server and its viewers."""

    model: str = "world/stream"
    threads: int = 1
    seconds: float = 10.0
    """Length of a stream."""
    arrivals: float = 0.5
    """Mean seconds between two viewers (a Poisson process)."""
    most: float = 2.0
    """Viewers at most, relative to what there is room for."""
    soak: float = 0.0
    """Minutes of viewers who steer, pause, leave and come back (`soaking.py`), instead of the rest: what the server holds is
    sampled, with its slope per hour."""
    every: float = 2.0
    """Seconds between two samples."""
    seed: int = 0


@dataclass
class Seen:
    """What one viewer has seen."""

    asked: float
    waited: bool = False
    refused: str = ""
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    """When each chunk came, and its time in the stream."""
    frames: int = 0

    @property
    def first(self) -> float:
        return self.arrivals[0][0] - self.asked

    @property
    def late(self) -> list[float]:
        """Seconds that each later chunk came after its player needed it."""
        begin, origin = self.arrivals[0]
        return [max(0.0, (now - begin) - (pts - origin)) for now, pts in self.arrivals[1:]]


async def watch(url: str, seconds: float, *, greedy: bool = False) -> Seen:
    """One viewer. A greedy one says at once that it has played what it got."""
    seen = Seen(time.perf_counter())
    async with connect(url.replace("http", "ws") + "/v1/stream", max_size=None) as socket:
        await socket.send(json.dumps({"type": "init", "seconds": seconds, "ack": greedy}))
        async for message in socket:
            if isinstance(message, bytes):
                continue
            told = json.loads(message)
            match told["type"]:
                case "queue":
                    seen.waited = True
                case "error":
                    seen.refused = told["code"]
                    break
                case "chunk":
                    seen.arrivals.append((time.perf_counter(), told["pts"]))
                    seen.frames += told["frames"]
                    if greedy:
                        await socket.send(json.dumps({"type": "ack", "frames": seen.frames}))
                case "done":
                    break
    return seen


async def crowd(url: str, count: int, case: Case) -> list[Seen]:
    """So many viewers, who come at random."""
    dice, coming = random.Random(case.seed + count), []
    for _ in range(count):
        coming.append(asyncio.create_task(watch(url, case.seconds)))
        await asyncio.sleep(dice.expovariate(1 / case.arrivals))
    return await asyncio.gather(*coming)


def summary(crowd: list[Seen]) -> dict[str, Any]:
    """Figures of those who were admitted at once, and numbers of the others."""
    served = [seen for seen in crowd if seen.arrivals and not seen.waited]
    first, late = [seen.first for seen in served], [late for seen in served for late in seen.late]
    found = {
        "viewers": len(crowd), "at once": len(served), "waited": sum(seen.waited for seen in crowd),
        "refused": sum(bool(seen.refused) for seen in crowd),
        "first frame p50": share(first, 0.5), "first frame p99": share(first, 0.99), "late p99": share(late, 0.99),
    }  # fmt: skip
    return rounded(found) | {"kept": found["first frame p99"] <= FIRST and found["late p99"] <= LATE}


def share(values: list[float], part: float) -> float:
    """The value that this part of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def alone(case: Case, chunks: int = 60) -> float:
    """Frames per second of the student without a server, when its memory is full."""
    torch.set_num_threads(case.threads)
    with VideoModel.from_pretrained(case.model).stream(["a red circle moves left"]) as live:
        list(live.frames(8))
        start = time.perf_counter()
        return sum(chunk.frames.shape[1] for chunk in live.frames(chunks)) / (time.perf_counter() - start)


def main(case: Case) -> dict[str, Any]:
    engine = 0.0 if case.soak else alone(case)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", SERVER, case.model, folder, str(case.threads)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}/v1/models") as answer:
                facts = json.load(answer)["data"][0]
            load = facts["chunk_seconds"] * facts["fps"] / facts["chunk_frames"][-1]
            room = max(1, int(0.85 / load))
            if case.soak:
                found = asyncio.run(soak(url, server.pid, room + 1, case.soak, case.every, case.seed))
                return {"room": room} | found
            return {"room": room} | measured(url, room, engine, case)
        finally:
            server.terminate()
            server.wait(30)


def measured(url: str, room: int, engine: float, case: Case) -> dict[str, Any]:
    """Crowds of several sizes, and one viewer who takes all that there is."""
    numbers = sorted({1, max(1, room // 2), room, int(case.most * room)})
    rows = [summary(asyncio.run(crowd(url, count, case))) for count in numbers]
    one = asyncio.run(watch(url, 60.0, greedy=True))
    begin = one.arrivals[8][0]
    speed = sum(now > begin for now, _ in one.arrivals) * one.frames / len(one.arrivals)
    speed /= one.arrivals[-1][0] - begin
    return {"rows": rows, "frames per second": speed, "without server": engine, "share": speed / engine}


if __name__ == "__main__":
    case = tyro.cli(Case, description=__doc__)
    show("serve", case, main(case))
