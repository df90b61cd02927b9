"""Does a server grow? Viewers come, steer, pause, leave and come back for hours, and what the server holds is sampled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from fewstep.metrics.statistics import Interval, t_quantile

BLOCKS = 12
"""Neighbouring samples are alike, so the line is fitted to the means of so many stretches, which nearly are not."""
WARM = 0.2
"""Share of the samples, at the beginning, that is left out: buffers and caches fill."""


@dataclass(frozen=True)
class Trend:
    """What a quantity does per hour, with a 95 % interval of Student's t."""

    first: float
    last: float
    """Means of the first and of the last stretch."""
    slope: float
    interval: Interval

    @property
    def grows(self) -> bool:
        """Whether the interval is above 0."""
        return self.interval.low > 0


def trend(seconds: Sequence[float], values: Sequence[float]) -> Trend:
    """A line through the means of stretches. ValueError for fewer than two samples per stretch."""
    begin = int(WARM * len(values))
    if len(values) - begin < 2 * BLOCKS:
        raise ValueError(f"{len(values)} samples are too few for a trend; soak for longer, or sample more often")
    t, y = (
        torch.stack([part.mean() for part in torch.tensor(list(row[begin:]), dtype=torch.float64).tensor_split(BLOCKS)])
        for row in (seconds, values)
    )
    t = (t - t.mean()) / 3600
    slope = float((t * y).sum() / (t * t).sum())
    rest = y - y.mean() - slope * t
    error = float((rest.square().sum() / (BLOCKS - 2) / (t * t).sum()).sqrt())
    half = t_quantile(0.95, BLOCKS - 2) * error
    return Trend(float(y[0]), float(y[-1]), slope, Interval(slope - half, slope + half))


def held(pid: int) -> dict[str, float]:
    """Threads, open files and memory (MiB) of the server and of its worker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {"threads": 0.0, "files": 0.0, "memory": 0.0}
    for process in (str(pid), *children):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        found["threads"] += int(status["Threads"])
        found["files"] += len(os.listdir(f"/proc/{process}/fd"))
        found["memory"] += int(status.get("VmRSS", "0 kB").split()[0]) / 1024
    return found


async def soak(url: str, pid: int, room: int, minutes: float, every: float, seed: int) -> dict[str, Any]:
    """Samples of what the server holds, every so many seconds, and their trends."""
    until, began = time.monotonic() + 60 * minutes, time.monotonic()
    guests = [asyncio.create_task(guest(url, until, random.Random(seed + number))) for number in range(room)]
    jobs = asyncio.create_task(clips(url, until))
    times, samples = list[float](), list[dict[str, float]]()
    while (now := time.monotonic()) < until:
        times.append(now - began)
        samples.append(held(pid))
        if len(samples) % 30 == 1:
            print({name: round(value, 1) for name, value in samples[-1].items()}, file=sys.stderr, flush=True)
        await asyncio.sleep(every)
    counts = await asyncio.gather(*guests)
    trends = {name: trend(times, [sample[name] for sample in samples]) for name in samples[0]}
    for name, found in trends.items():
        low, high = found.interval
        per_hour = f"{found.slope:+.2f} per hour (95 %: {low:+.2f} to {high:+.2f})"
        said = "GROWS" if found.grows else "no growth is seen"
        print(f"{name}: {per_hour}, {found.first:.1f} to {found.last:.1f}: {said}")
    rows = {name: {"slope": t.slope, "interval": list(t.interval), "grows": t.grows} for name, t in trends.items()}
    return {"minutes": minutes, "samples": len(samples), "streams": sum(counts), "clips": await jobs, "per hour": rows}


async def guest(url: str, until: float, dice: random.Random) -> int:
    """Viewers, one after the other: each steers, and many leave without a word. How many there were."""
    count = 0
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionClosed, OSError):
            async with connect(url.replace("http", "ws") + "/v1/stream", max_size=None) as socket:
                init = {"type": "init", "seconds": dice.choice((2, 5, 10)), "seed": dice.randrange(1000)}
                await socket.send(
                    json.dumps(init | {"media": dice.choice(("webp", "mp4")), "ack": dice.random() < 0.5})
                )
                await visit(socket, dice)
        count += 1
    return count


async def visit(socket: ClientConnection, dice: random.Random) -> None:
    """Watch a stream; change its prompt, pause it, take a snapshot, or drop the connection."""
    frames, leaves = 0, dice.choice((None, None, 1, 3))
    async for message in socket:
        if isinstance(message, bytes):
            continue
        told = json.loads(message)
        if told["type"] in ("done", "error") and told.get("fatal", True):
            return
        if told["type"] != "chunk":
            continue
        frames += told["frames"]
        await socket.send(json.dumps({"type": "ack", "frames": frames}))
        if told["index"] == leaves:
            socket.transport.abort()
            return
        how = dice.choice(("keep", "recache", "clear", "lerp"))
        others = ({"type": "prompt", "prompt": "a blue star", "how": how}, {"type": "snapshot"}, {"type": "pause"})
        for other in dice.choice(((), (), *((each,) for each in others))):
            await socket.send(json.dumps(other))
        await socket.send('{"type": "resume"}')


async def clips(url: str, until: float) -> int:
    """Clips, one after the other; each second one is deleted while it is made. How many there were."""
    count = 0
    while time.monotonic() < until:
        await asyncio.to_thread(clip, url, count % 2 == 0)
        count += 1
        await asyncio.sleep(5)
    return count


def clip(url: str, wait: bool) -> None:
    """One job, of a length that a student that streams makes soon; waited for or not, and deleted."""
    body = json.dumps({"prompt": "a red circle", "num_frames": 8}).encode()
    asked = urllib.request.Request(f"{url}/v1/videos", body, {"Content-Type": "application/json"})
    job = json.load(urllib.request.urlopen(asked))
    began = time.monotonic()
    while wait and job["status"] in ("queued", "in_progress") and time.monotonic() < began + 60:
        time.sleep(0.5)
        job = json.load(urllib.request.urlopen(f"{url}/v1/videos/{job['id']}"))
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/videos/{job['id']}", method="DELETE")).read()
