"""The demo: distil the shipped teacher on this machine, and measure speed and quality of the student.

One call trains one student for 4, 2 and 1 steps, compares it with its teacher on the same prompts, seeds and noise, and writes
the figures, the report, the student and a video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from fewstep.core.compiling import compile_problem
from fewstep.core.devices import has_bfloat16
from fewstep.data.video import write_video
from fewstep.diffusion import CFG, Uniform
from fewstep.engine import Optim, Settings, WorldProbe
from fewstep.evaluate import Report, Suite, entries, evaluate, load_report, write_report
from fewstep.evaluate.results import CLIPS
from fewstep.methods import DMD2, BackwardSimulation
from fewstep.models.runtime import Runtime
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.world.data import WorldClips

GRIDS = ((1.0,), (1.0, 0.5), (1.0, 0.83, 0.67, 0.5))
"""Times of 1, 2 and 4 steps before the shift. Two and four steps end from the same time, so that it is trained often."""

OPTIM = Optim(lr=5e-4, betas=(0.9, 0.99), warmup=20, decay="cosine")
"""Many small updates, and a critic that is four times as fast as its student: `dmd2+batch_4_one_turn` of docs/leaderboard.md."""

RECIPE = Recipe(
    model=Pretrained(source="world"),
    method=DMD2(
        rollout=BackwardSimulation(grids=GRIDS, shift=3.0),
        guidance=CFG(scale=2.5, high=0.9),
        critic_updates=1,
        score_density=Uniform(low=0.02, high=0.98, shift=2.0),
        critic_density=Uniform(shift=2.0),
    ),
    data=WorldClips(),
    settings=Settings(
        steps=790,
        batch=4,
        ema=0.97,
        log_every=4,
        save_every=100,
        health=None,  # checks would add 3 %; the probe chooses the student, and 128 clips of each row are measured at the end
        optim={"student": OPTIM, "critic": replace(OPTIM, lr=2e-3)},
    ),
    probe=WorldProbe(every=395, prompts=16),
)
"""What the demo runs: four minutes of training on two cores with bfloat16 arithmetic, twelve without."""

SUITE = Suite(prompts=64, seeds_per_prompt=2, batch=16, latency_runs=3, latency_budget=4.0)
"""What the demo measures: 128 clips per row."""


@dataclass(frozen=True)
class Demo:
    """The result of a demo: the figures, and the paths of everything else."""

    report: Report
    student: Path
    page: Path
    film: Path


def run_demo(
    output: Path | str,
    *,
    recipe: Recipe = RECIPE,
    suite: Suite = SUITE,
    quiet: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Demo:
    """Distil, measure and show. Writes `results.json`, `report.html`, `side_by_side.mp4` and `student/` to `output`.

    `progress(row, done, total)` is called during the measurement. A stopped demo resumes where it was.
    """
    output, recipe = Path(output), replace(recipe, settings=fitted(recipe.settings))
    student = recipe.run(output / "run", quiet=quiet)
    student.save(output / "student")
    runtime = Runtime(dtype="bfloat16" if recipe.settings.autocast == "bf16" else "float32")
    teacher, student = recipe.model.load().prepared(runtime), student.prepared(runtime)
    report = evaluate(entries(teacher, student), suite, output, progress=progress)
    page = write_report(output, run=output / "run", recipe=recipe.text)
    return Demo(report, output / "student", page, film(output, teacher.card.fps))


def fitted(settings: Settings) -> Settings:
    """The settings with what is fast on this machine: compiled blocks if compiling works, and bfloat16 arithmetic if the
    processor has it. The resolved recipe in the output says what was chosen.
    """
    return replace(settings, compile=not compile_problem(), autocast="bf16" if has_bfloat16() else "off")


def film(folder: Path, fps: float) -> Path:
    """A video with one line per measured prompt: the teacher at full steps, the teacher at 2 steps, the student at 2 steps."""
    clips = load_file(folder / CLIPS)
    columns = [clips[name] for name in (load_report(folder).reference, "teacher 2", "student 2")]
    path = folder / "side_by_side.mp4"
    return write_video(path, torch.stack(columns, 1).flatten(0, 1).float() / 127.5 - 1, fps=fps, scale=3, columns=3)
