"""Sample every row from the same prompts, seeds and noise, so that rows differ only in the model and its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fewstep.evaluate.cases import SEED_STRIDE, Cases, Rendered, TrueClips
from fewstep.evaluate.features.extractors import FeatureMap, feature_map
from fewstep.evaluate.inputs import require_transformers
from fewstep.evaluate.latency import synchronize
from fewstep.evaluate.measure import Judge, Measured, Meter, checked
from fewstep.evaluate.suite import Entry, Suite
from fewstep.models.runtime import Runtime
from fewstep.world.checker import read_scenes
from fewstep.world.grammar import world_prompts

if TYPE_CHECKING:
    from fewstep.evaluate.features.clip_score import ClipScore

Progress = Callable[[str, int, int], None]
"""Called as `(row, network steps done, of how many)`."""


@dataclass(frozen=True)
class Bench:
    """A suite prepared for the given models: prompts, seeds and features are fixed."""

    suite: Suite
    cases: Cases
    num_frames: int
    features: FeatureMap
    clip: ClipScore | None
    truth: TrueClips | None
    """True clips that distances are measured to; None: the clips of the reference row."""
    device: torch.device
    runtime: Runtime
    """How all models are run."""
    paired: bool
    """Whether all models start from the same noise (only if their latents have the same shape)."""

    @property
    def judges(self) -> tuple[Judge, ...]:
        """The functions that score clips against their prompts."""
        readable = self.cases.scenes is not None and self.num_frames > 1  # a picture shows no direction and no speed
        world = (checked(self.cases),) if readable else ()
        return world if self.clip is None else (*world, self.clip)


def prepare(entries: Sequence[Entry], suite: Suite) -> Bench:
    """Fix prompts, seeds, features; ValueError if the entries cannot be compared with each other."""
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"give at least one entry, and a different name to each; got {names}")
    if suite.reference is not None and suite.reference not in names:
        raise ValueError(f"reference {suite.reference!r} is not among the entries: {', '.join(names)}")
    for entry in entries:
        entry.contract.times()  # refuse an untrained step count now, not after an hour of sampling
        if "image" in entry.model.parts:
            raise ValueError(
                f"{entry.name!r} is an image-to-video model, and a suite has only prompts; look at its clips with "
                "fewstep sample --image, or evaluate text-to-video models"
            )
        if entry.contract.grid.video_noise is not None:
            raise ValueError(
                f"{entry.name!r} makes given videos sharp, and a suite has only prompts; look at its clips with fewstep sample "
                "--video, or evaluate models that begin with noise"
            )
    shapes = {(suite.num_frames or e.model.card.num_frames, e.model.card.height, e.model.card.width) for e in entries}
    if len(shapes) > 1:
        raise ValueError(
            f"the models make clips of different (frames, height, width): {sorted(shapes)}; give models of one size"
        )
    (num_frames, height, width), *_ = shapes
    if num_frames == 2:
        raise ValueError("num_frames must be 1 (pictures) or at least 3 (motion and flicker), got 2")
    if len({entry.model.device for entry in entries}) > 1:
        raise ValueError("the models are on different devices; move them to one with model.to(device)")
    if len({entry.model.runtime for entry in entries}) > 1:
        raise ValueError("the models run in different ways; give all of them one Runtime: model.prepared(runtime)")
    size, device = (height, width), entries[0].model.device
    features = feature_map("pooled" if (suite.features, num_frames) == ("auto", 1) else suite.features, size, device)
    features.check(num_frames, size, device)
    cases, truth = ask(suite, num_frames, size)
    return Bench(
        suite=suite,
        cases=cases,
        num_frames=num_frames,
        features=features,
        clip=_clip_score(suite.clip, cases, device) if suite.clip else None,
        truth=truth,
        device=device,
        runtime=entries[0].model.runtime,
        paired=len({entry.model.latent_shape(num_frames) for entry in entries}) == 1,
    )


def ask(suite: Suite, num_frames: int, size: tuple[int, int]) -> tuple[Cases, TrueClips | None]:
    """The prompts of a suite, and the true clips to compare with: real clips, or rendered ones if the prompts have scenes."""
    prompts, real = suite.texts, None
    if suite.real is not None:
        real = suite.real.draw(len(prompts) or suite.prompts, num_frames, size, suite.seed)
        real = replace(real, asked=not prompts)
        prompts = prompts or real.captions
    prompts = prompts or world_prompts(suite.prompts, suite.paraphrased, suite.seed)
    scenes = read_scenes(prompts, *size)
    if scenes is None and not (suite.texts or real):
        raise ValueError(
            f"clips of {size[0]} x {size[1]} do not fit the prompts of the built-in world; give your own prompts "
            "(Suite.texts, --prompt-file)"
        )
    cases = Cases(prompts, scenes, suite.seeds_per_prompt, suite.seed * SEED_STRIDE)
    return cases, real or (None if scenes is None else Rendered(cases, num_frames))


def _clip_score(folder: str, cases: Cases, device: torch.device) -> ClipScore:
    require_transformers("CLIPScore")
    from fewstep.evaluate.features.clip_score import ClipScore

    return ClipScore(Path(folder), cases, device)


@torch.inference_mode()
def sample(entry: Entry, bench: Bench, progress: Progress | None = None) -> Measured:
    """Sample and measure every clip of one entry."""
    cases, suite = bench.cases, bench.suite
    meter = Meter(bench.features, cases, bench.judges, keep=suite.previews)
    group = max(1, suite.batch // cases.seeds_per_prompt)  # the seeds of a prompt stay in one batch
    starts = range(0, len(cases.prompts), group)
    seconds = 0.0
    for done, first in enumerate(starts):
        last = min(first + group, len(cases.prompts))
        prompts = [p for p in cases.prompts[first:last] for _ in range(cases.seeds_per_prompt)]
        seeds = [seed for p in range(first, last) for seed in cases.seeds(p)]

        synchronize(bench.device)
        began = time.perf_counter()
        for step in entry.sampling(prompts, seeds, bench.num_frames):
            if progress is not None:
                progress(entry.name, done * step.steps + step.index + 1, len(starts) * step.steps)
        synchronize(bench.device)
        seconds += time.perf_counter() - began
        meter.add(entry.decode(step.x), first, last)
    return meter.done(seconds)


@torch.inference_mode()
def sample_truth(bench: Bench, truth: TrueClips, which: int) -> Measured:
    """Draw and measure one set of true clips, one clip for each clip of the suite."""
    cases, group = bench.cases, max(1, truth.batch // bench.cases.seeds_per_prompt)
    meter = Meter(bench.features, cases, bench.judges if which == truth.judged else ())
    spans = [(first, min(first + group, len(cases.prompts))) for first in range(0, len(cases.prompts), group)]
    for (first, last), clips in zip(spans, truth.draw(which, spans), strict=True):
        meter.add(clips.to(bench.device), first, last)
    return meter.done()
