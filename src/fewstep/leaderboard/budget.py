"""The budget of a run: network forward-equivalents, the same for every method.

One unit is one forward pass of the teacher on one whole clip; a backward pass counts two (`methods.work`). What a method spends
before its run, on stored pairs, counts too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from fewstep.leaderboard.stages import each, stages_of
from fewstep.methods.work import Work
from fewstep.pipeline import Pipeline, Stage
from fewstep.recipe import Recipe

Part = TypeVar("Part", Recipe, Stage)
CLIP, BLOCKS = 16, 6
"""Frames of a clip of the built-in world, and blocks of its teacher."""


def work(recipe: Recipe | Pipeline) -> float:
    """Forward-equivalents of a whole run: iterations, times clips per iteration, times the work of one clip.

    Networks are counted as large as the model the run starts from; discriminator heads are left out, as in `Method.cost`.
    """
    return sum(work_of(stage) for stage in stages_of(recipe))


def work_of(stage: Recipe | Stage) -> float:
    """Forward-equivalents of one stage, of all clips of its iterations."""
    settings = stage.settings
    frames = getattr(stage.data, "num_frames", None) or CLIP
    per_clip = sum(share(one, frames) for one in stage.method.cost())
    return settings.steps * settings.batch * settings.accumulate * per_clip


def share(one: Work, frames: int, blocks: int = BLOCKS) -> float:
    """Forward-equivalents on whole clips: a network that reads 4 of 16 frames counts a quarter, one that runs 2 of 8 blocks too.

    >>> share(Work("critic", 3, frames=4), frames=16), share(Work("teacher", 2, layers=(0, 1)), frames=16, blocks=8)
    (0.75, 0.5)
    """
    seen = min(one.frames, frames) / frames if one.frames else 1.0
    deep = 1.0
    if one.layers:
        deep = (max(layer % blocks for layer in one.layers) + 1) / blocks
    return one.forwards * seen * deep


DEMO = 35_840.0
"""The demo's budget, in forward passes: `fewstep demo` trains for as many iterations as it pays for."""


def lengthened(recipe: Recipe | Pipeline, budget: float) -> Recipe | Pipeline:
    """The recipe with as many iterations as `budget` pays for. Stages keep their shares.

    ValueError if it does not pay for one iteration of every stage.
    """
    factor = budget / work(recipe)
    return each(recipe, lambda stage: _longer(stage, factor))


def _longer(stage: Part, factor: float) -> Part:
    steps = int(stage.settings.steps * factor)
    if steps < 1:
        raise ValueError(
            f"the budget pays for less than one iteration of {type(stage.method).__name__}; give a larger one"
        )
    settings = replace(stage.settings, steps=steps, save_every=max(1, steps // 8))
    return replace(stage, method=stage.method.lengthened(steps / stage.settings.steps), settings=settings)
