"""A live stream: time to the first frame, time between chunks, frames per second, and memory that stays as it is.

    python bench/stream.py
    python bench/stream.py --minutes 4
    python bench/stream.py --model wan-1.3b --device cuda --dtype bfloat16 --compile

`world` is the built-in teacher made to stream (its clips look bad, its times are a student's); `wan-1.3b` has random weights and
text states. Frames count when they are bytes on the CPU: decoding is included, encoding to a file is not. The first frame
includes reading the prompt, where there is a text encoder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro

from fewstep.attention import BlockCausal
from fewstep.core import Cond, Rng
from fewstep.diffusion import CFG, Contract, Exact, Renoise, Shifted, Stream
from fewstep.evaluate.latency import memory_in_use
from fewstep.models import Card, Denoiser, VideoModel
from fewstep.models.repattern import repattern
from fewstep.models.runtime import Runtime
from fewstep.streaming import LiveSession, Session
from measuring import WAN, Timer, changes, load, middle, rounded, write

PROMPT = "a red circle moves left"
GRIDS = {1: (1.0, 0.0), 2: (1.0, 0.75, 0.0), 4: (1.0, 0.9375, 0.8333, 0.625, 0.0)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stream."""

    model: str = "world"
    """`world`, `wan-1.3b`, or the folder of a student that streams, as it is."""
    steps: Literal[1, 2, 4] = 2
    chunk: int = 4
    window: int = 12
    sink: int = 4
    commit: Literal["clean", "last"] = "clean"
    chunks: int = 40
    """Chunks that are measured, after those that fill the window."""
    rounds: int = 12
    """Streams that are begun, for the time to the first frame."""
    minutes: float = 0.0
    """Minutes for which memory is watched besides."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    device: str = "cpu"
    small: bool = False
    """A tiny `wan-1.3b`, to try the script itself."""


def student(case: Case) -> tuple[VideoModel, dict[str, Any]]:
    """A model that streams, and what its sessions are told."""
    wan = case.model == "wan-1.3b"
    model = random_wan(case) if wan else load(case.model)[0]
    if wan or case.model == "world":
        stream = Stream(chunks=(case.chunk,), window=case.window, sink=case.sink, commit=case.commit)
        grid = Exact(grids=(GRIDS[case.steps],), otherwise=Shifted())
        contract = Contract(sampler=Renoise(), steps=case.steps, grid=grid, guidance=CFG(), stream=stream)
        pattern = BlockCausal(chunk=case.chunk, window=case.window, sink=case.sink)
        model = model.with_part("denoiser", repattern(model.denoiser, pattern), contract=contract)
    model = model.prepared(Runtime(dtype=case.dtype, compile=case.compile, device=case.device))
    if not wan:
        return model, {}
    text = Rng(0).randn((1, 512, WAN["text_dim"]), "text").to(case.device)
    cond = Cond(text, text.new_ones(1, 512, dtype=torch.bool))
    return model, {"conditions": (cond, cond)}


def random_wan(case: Case) -> VideoModel:
    """Denoiser and autoencoder of Wan2.1-T2V-1.3B with random weights; no text encoder."""
    from fewstep.models.adapters.codecs.codec import VideoCodec
    from fewstep.models.adapters.dits.wan import Wan

    torch.manual_seed(0)
    card = Card(
        name="wan-1.3b", num_frames=81, height=64 if case.small else 480, width=64 if case.small else 832, fps=16
    )
    size = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64} if case.small else {}
    denoiser = Denoiser(Wan(config=WAN | size), card.path, card.kind)
    codec = VideoCodec(config={"base_dim": 8} if case.small else {})
    return VideoModel(
        card, {part: net.requires_grad_(False) for part, net in (("denoiser", denoiser), ("codec", codec))}
    )


def begun(model: VideoModel, told: dict[str, Any], seed: int = 0, *, beside: bool = True) -> LiveSession:
    return LiveSession(Session(model, [PROMPT], seed=seed, **told), beside=beside)


def first_frame(model: VideoModel, told: dict[str, Any], seed: int) -> float:
    """Seconds from the wish for a stream to its first frames."""
    start = time.perf_counter()
    with begun(model, told, seed) as live:
        next(live.frames())
        return time.perf_counter() - start


def chunks(case: Case, model: VideoModel, told: dict[str, Any], *, beside: bool) -> dict[str, Any]:
    """Seconds between chunks and frames per second, after the first chunks; and where the time goes."""
    arrivals, worked, frames, took = list[float](), list[float](), 0, []
    with begun(model, told, beside=beside) as live:
        for chunk in live.frames(warm_up(case) + case.chunks):
            arrivals.append(time.perf_counter())
            worked.append(time.process_time())
            if len(arrivals) > warm_up(case):
                frames += chunk.frames.shape[1]
                took.append(chunk.took)
    arrivals = arrivals[warm_up(case) - 1 :]
    between = [b - a for a, b in zip(arrivals, arrivals[1:])]
    return {
        "frames per second": frames / (arrivals[-1] - arrivals[0]),
        "between chunks, ms": percentiles(between),
        "processor time of a chunk, ms": round(1000 * (worked[-1] - worked[warm_up(case) - 1]) / case.chunks, 1),
        "of a chunk, ms": {name: middle([getattr(t, name) for t in took]) for name in ("denoise", "commit", "decode")},
    }


def warm_up(case: Case) -> int:
    """Chunks that fill the window, and two more."""
    return -(-case.window // case.chunk) + 2


def overhead(case: Case, model: VideoModel, told: dict[str, Any]) -> dict[str, float]:
    """Seconds of a chunk of latents, with its commit, over the seconds inside its network calls."""
    timer, session, ratios = Timer(case.device), Session(model, [PROMPT], **told), list[float]()
    list(session.take(warm_up(case)))
    with watched(model, timer) as inside:
        for _ in range(case.chunks):
            inside.clear()
            whole = timer.of(lambda: list(session.take(1)))
            ratios.append(whole / sum(inside))
        calls = len(inside)
    return {"network calls": calls, "chunk over its network calls": middle(ratios)}


@contextmanager
def watched(model: VideoModel, timer: Timer) -> Iterator[list[float]]:
    """Seconds of every call of the denoiser meanwhile."""
    seconds, start = list[float](), [0.0]
    hooks = (
        model.denoiser.register_forward_pre_hook(lambda *_: start.__setitem__(0, timer())),
        model.denoiser.register_forward_hook(lambda *_: seconds.append(timer() - start[0])),
    )
    yield seconds
    for hook in hooks:
        hook.remove()


def soak(case: Case, model: VideoModel, told: dict[str, Any]) -> dict[str, Any]:
    """Memory of every minute: the middle of what was seen after each chunk."""
    start, seen, made = time.monotonic(), dict[int, list[float]](), 0
    with begun(model, told) as live:
        for chunk in live.frames():
            minute, made = int((time.monotonic() - start) / 60), made + chunk.frames.shape[1]
            if time.monotonic() - start >= 60 * case.minutes:
                break
            seen.setdefault(minute, []).append(memory_in_use(case.device) / 2**20)
    middles = [middle(values) for values in seen.values()]
    growth = middles[-1] / middles[1] - 1 if len(middles) > 2 else None
    return {"MiB by minute": middles, "growth from the second minute to the last": growth, "frames": made}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return rounded({"p50": at(0.5), "p95": at(0.95), "p99": at(0.99)}, 1)


def measure(case: Case) -> dict[str, Any]:
    model, told = student(case)
    begin = [first_frame(model, told, seed) for seed in range(case.rounds + 2)][2:]  # the first two compile and warm up
    found: dict[str, Any] = {
        "first frame, ms": percentiles(begin),
        "decoded beside": chunks(case, model, told, beside=True),
        "decoded between": chunks(case, model, told, beside=False),
        **overhead(case, model, told),
        "threads": torch.get_num_threads(),
    }
    if case.minutes:
        found["memory"] = soak(case, model, told)
    return found


def main(case: Case) -> None:
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device")
        return
    found = measure(case)
    for name, value in found.items():
        print(name, value)
    named = replace(case, model=case.model.rstrip("/").replace("/", "_"))
    print(write("-".join(["stream", *changes(named)]), case, found, case.device))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Case, description=__doc__)))
