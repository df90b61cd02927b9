"""The cost of one clip of an entry: time, arithmetic, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.flops import count_flops
from fewstep.diffusion.samplers import finish
from fewstep.evaluate.latency import Latency, measure_latency, peak_memory
from fewstep.evaluate.sampling import Bench
from fewstep.evaluate.suite import Entry


@dataclass(frozen=True)
class Cost:
    """Cost of a single clip, alone in its batch."""

    sampling: Latency
    """Latency from text to latents."""
    decoding: Latency
    """Latency from latents to frames."""
    flops: int
    """Floating-point operations from text to latents."""
    memory: int
    """Peak memory in bytes, from text to frames."""
    memory_kind: str


@torch.inference_mode()
def cost(entry: Entry, bench: Bench) -> Cost:
    """Generate the first clip of the suite repeatedly and measure it. The FLOP count runs first, as a warm-up."""
    prompts, seeds = bench.cases.prompts[:1], bench.cases.seeds(0)[:1]
    suite = bench.suite

    def draw() -> Tensor:
        return finish(entry.sampling(prompts, seeds, bench.num_frames))

    flops = count_flops(draw)
    latents = draw()
    memory, kind = peak_memory(lambda: entry.decode(draw()), bench.device)
    runs, budget = suite.latency_runs, suite.latency_budget
    sampling = measure_latency(draw, runs=runs, budget=budget, warmup=0, device=bench.device)
    decoding = measure_latency(lambda: entry.decode(latents), runs=runs, budget=budget / 4, device=bench.device)
    return Cost(sampling, decoding, flops, memory, kind)
