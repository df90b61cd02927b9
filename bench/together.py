"""Streams whose network calls are made as one (`fewstep serve --batch`), beside the same streams one call after the other.

    python bench/together.py
    python bench/together.py --model runs/mine/student --streams 2 4 --rounds 20

The streams are of different age, each a call further in its chunk than the one before, with full memories. Both sides make the
same number of calls in each round, in turns, and decode their chunks alike. Chunks per second of all streams together, and the
ratio of times, round by round: below 1 the batch is faster, and 1 divided by it is how many times as many viewers it serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import tyro

from fewstep.models import VideoModel
from fewstep.serve.worker import full_chunks
from fewstep.streaming import LiveSession
from fewstep.streaming.together import Together
from measuring import rounded, show


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, and numbers of its streams."""

    model: str = "world/stream"
    streams: tuple[int, ...] = (2, 3, 4)
    rounds: int = 12
    chunks: int = 1
    """Chunks of each stream in a round."""
    threads: int = 1


def main(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    model = VideoModel.from_pretrained(case.model)
    return {f"{count} streams": compared(case, model, count) for count in case.streams}


def compared(case: Case, model: VideoModel, count: int) -> dict[str, Any]:
    """So many streams, one call after the other and together."""
    calls, together = model.card.contract.steps + 1, Together(count)
    with ExitStack() as ended:
        apart, joined = (streams(model, count, calls, ended) for _ in range(2))

        def one_by_one() -> None:
            for live in apart.values():
                live.work()

        def as_one() -> None:
            for lane in together({name: live.work for name, live in joined.items()}).values():
                lane.done.result()

        sides, seconds = (one_by_one, as_one), (list[float](), list[float]())
        for number in range(-1, case.rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                took = timed(sides[side], case.chunks * calls)
                if number >= 0:  # the first round is to warm up
                    seconds[side].append(took)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    each = case.chunks * count
    return rounded({
        "chunks per second apart": each / median(seconds[0]), "as one": each / median(seconds[1]),
        "ratio of times": median(ratios), "least": ratios[0], "quarter": ratios[len(ratios) // 4],
        "three quarters": ratios[-1 - len(ratios) // 4], "most": ratios[-1],
    })  # fmt: skip


def streams(model: VideoModel, count: int, calls: int, ended: ExitStack) -> Mapping[str, LiveSession]:
    """Streams with full memories, each a chunk and a call older than the one before."""
    made = {
        str(seed): ended.enter_context(model.stream(["a red circle moves left"], seed=seed)) for seed in range(count)
    }
    for number, live in enumerate(made.values()):
        for _ in range((full_chunks(model) + number) * calls + number):
            live.work()
    return made


def timed(work: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


if __name__ == "__main__":
    case = tyro.cli(Case, description=__doc__)
    show("together", case, main(case))
