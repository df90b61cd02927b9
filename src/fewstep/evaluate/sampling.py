"""Draws every clip of every row from one set of prompts, seeds and noise, so that rows differ only by what is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fewstep.evaluate.cases import Cases, true_clips
from fewstep.evaluate.latency import synchronize
from fewstep.evaluate.measure import FeatureMap, Measured, Meter, feature_map
from fewstep.evaluate.suite import Entry, Suite
from fewstep.world.checker import read_scenes
from fewstep.world.grammar import world_prompts

Progress = Callable[[str, int, int], None]
"""Called as `(row, network steps done, of how many)`."""

SEED_STRIDE = 1_000_003  # keeps the clips of two suites with neighbouring seeds apart


@dataclass(frozen=True)
class Bench:
    """A suite made concrete for the models at hand."""

    suite: Suite
    cases: Cases
    num_frames: int
    features: FeatureMap
    device: torch.device
    paired: bool
    """Every model starts from the same noise (their latents have one shape)."""

    def precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.suite.autocast == "bf16")


def prepare(entries: Sequence[Entry], suite: Suite) -> Bench:
    """Fix prompts, seeds, features; ValueError if the entries cannot be compared with each other."""
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"entries need unique names and there must be one at least, got {names}")
    if suite.reference is not None and suite.reference not in names:
        raise ValueError(f"reference {suite.reference!r} is not among the entries: {', '.join(names)}")
    for entry in entries:
        entry.contract.times()  # an untrained step count stops here, not after an hour
    shapes = {(suite.num_frames or e.model.card.num_frames, e.model.card.height, e.model.card.width) for e in entries}
    if len(shapes) > 1:
        raise ValueError(
            f"the models make clips of different (frames, height, width): {sorted(shapes)}; compare like with like"
        )
    (num_frames, height, width), *_ = shapes
    if num_frames < 3:
        raise ValueError(f"num_frames must be at least 3 for motion and flicker, got {num_frames}")
    if len({entry.model.device for entry in entries}) > 1:
        raise ValueError("the models lie on different devices; move them to one with model.to(device)")
    prompts = suite.texts or world_prompts(suite.prompts, suite.paraphrased, suite.seed)
    scenes = read_scenes(prompts, height, width)
    if scenes is None and not suite.texts:
        raise ValueError(
            f"{height}x{width} clips are not of the built-in world: give your own prompts (texts, --prompt-file)"
        )
    return Bench(
        suite=suite,
        cases=Cases(prompts, scenes, suite.seeds_per_prompt, suite.seed * SEED_STRIDE),
        num_frames=num_frames,
        features=feature_map(suite.features, (height, width), entries[0].model.device),
        device=entries[0].model.device,
        paired=len({entry.model.latent_shape(num_frames) for entry in entries}) == 1,
    )


@torch.inference_mode()
def sample(entry: Entry, bench: Bench, progress: Progress | None = None) -> Measured:
    """Draw and measure every clip of one entry."""
    cases, suite = bench.cases, bench.suite
    meter = Meter(bench.features, cases, keep=suite.previews)
    group = max(1, suite.batch // cases.seeds_per_prompt)  # the seeds of a prompt stay in one batch
    starts = range(0, len(cases.prompts), group)
    steps, seconds = entry.contract.steps, 0.0
    for done, first in enumerate(starts):
        last = min(first + group, len(cases.prompts))
        prompts = [p for p in cases.prompts[first:last] for _ in range(cases.seeds_per_prompt)]
        seeds = [seed for p in range(first, last) for seed in cases.seeds(p)]

        def watch(step: int, _: object, done: int = done) -> None:
            if progress is not None:
                progress(entry.name, done * steps + step + 1, len(starts) * steps)

        with bench.precision():
            synchronize(bench.device)
            began = time.perf_counter()
            latents = entry.latents(prompts, seeds, bench.num_frames, watch)
            synchronize(bench.device)
            seconds += time.perf_counter() - began
            frames = entry.decode(latents)
        meter.add(frames, first, last)
    return meter.done(seconds)


@torch.inference_mode()
def sample_truth(bench: Bench, which: int) -> Measured:
    """Draw and measure one rendered clip for each clip of the suite; another `which` is an independent set."""
    cases, group = bench.cases, max(1, 64 // bench.cases.seeds_per_prompt)
    meter = Meter(bench.features, cases)
    generator = torch.Generator().manual_seed(cases.first_seed + SEED_STRIDE // 2 + which)
    for first in range(0, len(cases.prompts), group):
        last = min(first + group, len(cases.prompts))
        clips = true_clips(cases.scene_per_clip(first, last), bench.num_frames, generator)
        meter.add(clips.to(bench.device), first, last)
    return meter.done()
