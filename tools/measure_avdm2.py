"""Measure AVDM2 students next to their teacher: evaluation figures, identity from frame to frame, and style.

    python tools/measure_avdm2.py --output runs/avdm2 "frames=runs/world/avdm2/student" "adversarial only=..."

Prints two tables in Markdown and draws `clips.gif`. Every row has the same prompts, seeds and noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.env import cpu_count
from fewstep.evaluate import Entry, Report, Suite, evaluate
from fewstep.evaluate.page.animate import grid_gif
from fewstep.evaluate.results import CLIPS
from fewstep.models.bundle import VideoModel
from fewstep.world.checker import ABSTAIN, Checker
from fewstep.world.grammar import ATTRIBUTES, Scene, parse, world_prompts
from fewstep.world.renderer import STYLES
from fewstep.world.styles import nearest_style

NAMES = tuple(ATTRIBUTES)
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames of all clips of a row, each read alone. Shares in [0, 1]."""

    changes: float
    """Neighbouring frames, both readable, that show another shape or colour."""
    unreadable: float
    """Frames whose shape or colour is not clear."""
    right: Mapping[str, float]
    """By style: clips with the five attributes right that every style has, read as that style."""
    drawn: Mapping[str, float]
    """By style: clips that look most like it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("students", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--prompts", type=int, default=64, help="two seeds each; single frames and styles are read on the first"
    )
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(cpu_count())
    teacher = VideoModel.from_pretrained("world")
    rows = [
        Entry(name="teacher 50", model=teacher),
        Entry(name=f"teacher {options.steps}", model=teacher, steps=options.steps),
    ]
    for name, folder in (student.split("=", 1) for student in options.students):
        rows.append(Entry(name=name, model=VideoModel.from_pretrained(folder), steps=options.steps))
    suite = Suite(prompts=options.prompts, previews=options.prompts, latency_runs=3, latency_budget=2.0)
    report = evaluate(rows, suite, options.output)
    scenes = [parse(prompt) for prompt in world_prompts(suite.prompts, suite.paraphrased, suite.seed)]
    clips = {name: made.float() / 127.5 - 1 for name, made in load_file(options.output / CLIPS).items()}
    for line in tables(report, {entry.name: read(clips[entry.name], scenes) for entry in rows}):
        print(line)
    grid_gif(options.output / "clips.gif", {entry.name: clips[entry.name][:SHOWN] for entry in rows}, scale=3)
    return 0


def read(clips: Tensor, scenes: Sequence[Scene]) -> Frames:
    """What the checker sees of single frames, and of clips `[N, 3, F, H, W]` in each style."""
    right = {style: Checker(style=style).score(clips, scenes).right[:, :5].all(1) for style in STYLES}
    best = max(STYLES, key=lambda style: float(right[style].float().mean()))
    alone = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    seen = Checker(style=best).read(alone).values[:, [NAMES.index("shape"), NAMES.index("colour")]]
    seen = seen.unflatten(0, (len(clips), -1))
    clear = (seen != ABSTAIN).all(2)
    both = clear[:, 1:] & clear[:, :-1]
    nearest = nearest_style(clips, scenes)
    changed = (seen[:, 1:] != seen[:, :-1]).any(2) & both
    return Frames(
        changes=float(changed.sum() / both.sum().clamp(min=1)),
        unreadable=1 - float(clear.float().mean()),
        right={style: float(each.float().mean()) for style, each in right.items()},
        drawn={style: float((nearest == k).float().mean()) for k, style in enumerate(STYLES)},
    )


def tables(report: Report, frames: Mapping[str, Frames]) -> Iterator[str]:
    """Markdown."""
    clips = report.seeds["clips"]
    yield f"{clips} clips per row, seed {report.suite['seed']}; floor of the distance {report.frechet_floor:.2f}"
    yield row_of(("", "accuracy", "95 %", "Frechet", "motion", "diversity", "flicker"))
    yield row_of(["---"] * 7)
    for row in report.rows:
        low, high = row.accuracy_ci or (0.0, 0.0)
        figures = (row.accuracy, row.frechet, row.motion, row.diversity, row.flicker)
        accuracy, distance, *rest = ("-" if value is None else f"{value:.2f}" for value in figures)
        yield row_of((row.name, accuracy, f"{low:.2f} to {high:.2f}", distance, *rest))
    yield ""
    styles = [*(f"{style}: five right" for style in STYLES), *(f"drawn as {style}" for style in STYLES)]
    yield row_of(("", *NAMES, "another object in the next frame", "frame unreadable", *styles))
    yield row_of(["---"] * (9 + len(styles)))
    for row in report.rows:
        mine, attributes = frames[row.name], row.attributes or {}
        shares = [*attributes.values(), mine.changes, mine.unreadable, *mine.right.values(), *mine.drawn.values()]
        yield row_of((row.name, *(f"{share:.3f}" for share in shares)))


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
