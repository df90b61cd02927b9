"""fewstep: takes a slow video diffusion model and hands back a fast one, with proof."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.core.build import RecipeError
    from fewstep.models.bundle import VideoModel
    from fewstep.pipeline import Pipeline, Stage
    from fewstep.recipe import Recipe, distill
    from fewstep.students import Students

__version__ = "0.1.0"
__all__ = ["Pipeline", "Recipe", "RecipeError", "Stage", "Students", "VideoModel", "__version__", "distill"]

_HOMES = {
    "Pipeline": "fewstep.pipeline",
    "Stage": "fewstep.pipeline",
    "Recipe": "fewstep.recipe",
    "RecipeError": "fewstep.core.build",
    "Students": "fewstep.students",
    "VideoModel": "fewstep.models.bundle",
    "distill": "fewstep.recipe",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fewstep` and `fewstep --help` do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
