"""Measure the built-in world: speed of rendering, accuracy of the checker, the autoencoder and the teacher.

`python tools/measure_world.py` (minutes); `--prompts N` for the teacher's accuracy, `--weights DIR` for networks elsewhere
than in the package (a folder with `teacher/`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.env import cpu_count
from fewstep.evaluate import describe_machine
from fewstep.metrics import clustered_wilson
from fewstep.models.bundle import BUILT_IN, VideoModel
from fewstep.world.checker import Checker
from fewstep.world.data import labels
from fewstep.world.grammar import ATTRIBUTES, Scene, paraphrase, parse, sample_scenes, world_prompts
from fewstep.world.renderer import Variation, render

AT_ONCE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--prompts", type=int, default=64, help="prompts for the teacher, two seeds each; 0 leaves it out"
    )
    parser.add_argument("--weights", type=Path, default=BUILT_IN)
    options = parser.parse_args()
    torch.set_num_threads(cpu_count())
    machine = describe_machine()
    print(f"{machine.cpu}, {machine.cores} cores, torch {torch.__version__}")
    print(f"renderer: {renderer_speed():,.0f} clips of 16 frames a second")
    scenes, clips = draw(2000, seed=1)
    say("checker on ground truth", right(clips, scenes), 1)
    if not (options.weights / "teacher" / "card.json").is_file():
        print(f"{options.weights}: no teacher there, so nothing more to measure")
        return 1
    teacher = VideoModel.from_pretrained(options.weights / "teacher")
    scenes, clips = draw(512, seed=2)
    say("checker on what the autoencoder makes of ground truth", right(reconstruct(teacher, clips), scenes), 1)
    say("text encoder on paraphrases", read_text(teacher, 2000, seed=3), 1)
    if options.prompts:
        contract = teacher.card.contract
        title = f"teacher, {contract.steps} steps, guidance {contract.guidance.scale:g}, {options.prompts} prompts x 2 seeds"
        say(title, generate(teacher, options.prompts, seed=4), 2)
    return 0


def renderer_speed(seconds: float = 3.0) -> float:
    """Clips a second, rendered 64 at once."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        draw(AT_ONCE, seed=done)
        done += AT_ONCE
    return done / (time.perf_counter() - began)


def draw(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Random scenes and a clip of each."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    return scenes, render(scenes, Variation.sample(count, generator))


def right(clips: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Which attributes the checker reads as they are, `[N, 6]`."""
    starts = range(0, len(scenes), AT_ONCE)
    return torch.cat([Checker().score(clips[i : i + AT_ONCE], scenes[i : i + AT_ONCE]).right for i in starts])


@torch.inference_mode()
def reconstruct(model: VideoModel, clips: Tensor) -> Tensor:
    """Clips through the autoencoder and back."""
    return torch.cat([model.codec.decode(model.codec.encode(part)).clamp(-1, 1) for part in clips.split(AT_ONCE)])


@torch.inference_mode()
def read_text(model: VideoModel, count: int, seed: int) -> Tensor:
    """Which attributes the text encoder's own heads read from paraphrased prompts, `[N, 6]`."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    read = model.text.classify(model.text.encode([paraphrase(scene, generator) for scene in scenes]))
    return torch.stack([logits.argmax(1) for logits in read], 1) == labels(scenes)


def generate(model: VideoModel, prompts: int, seed: int) -> Tensor:
    """Which attributes the checker finds in sampled clips, two per prompt, `[2N, 6]`."""
    texts = [text for text in world_prompts(prompts, 0.5, seed) for _ in range(2)]
    found = []
    for i in range(0, len(texts), AT_ONCE):
        clips = model(texts[i : i + AT_ONCE], seed=10**6 * seed + i)
        found.append(right(clips.float(), [parse(text) for text in texts[i : i + AT_ONCE]]))
        print(f"  {min(i + AT_ONCE, len(texts))} of {len(texts)} clips", end="\r", flush=True)
    return torch.cat(found)


def say(what: str, hits: Tensor, seeds: int) -> None:
    """Shares right with their 95 % intervals; `seeds` clips in a row belong to one prompt."""
    print(f"{what}, {len(hits)} clips or prompts:")
    columns = dict(zip(ATTRIBUTES, hits.unbind(1), strict=True)) | {"all": hits.all(1)}
    for name, column in columns.items():
        shares = column.double().unflatten(0, (-1, seeds)).mean(1)
        low, high = clustered_wilson(shares, seeds)
        print(f"  {name:<10} {100 * float(shares.mean()):6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")


if __name__ == "__main__":
    raise SystemExit(main())
