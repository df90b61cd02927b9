"""The stages of a recipe, which are several or itself alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewstep.pipeline import Pipeline, Stage
from fewstep.recipe import Recipe


def stages_of(recipe: Recipe | Pipeline) -> tuple[Recipe | Stage, ...]:
    return tuple(recipe.stages.values()) if isinstance(recipe, Pipeline) else (recipe,)


def each(recipe: Recipe | Pipeline, change: Callable[[Any], Any]) -> Recipe | Pipeline:
    """The recipe with every stage changed."""
    if isinstance(recipe, Pipeline):
        return replace(recipe, stages={name: change(stage) for name, stage in recipe.stages.items()})
    changed: Recipe = change(recipe)
    return changed
