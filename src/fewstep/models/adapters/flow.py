"""Times from a flow scheduler of diffusers, which may depend on the number of tokens of a clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewstep.core import RecipeError
from fewstep.diffusion import CFG, Contract, Shifted

_REFUSED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def contract_of(scheduler: Mapping[str, Any], *, steps: int, scale: float, tokens: int | None = None) -> Contract:
    """Euler over the times of `FlowMatchEulerDiscreteScheduler`, with guidance of strength `scale`.

    `tokens` of a clip, for models whose shift may depend on them.
    """
    for key in _REFUSED:
        if scheduler.get(key):
            raise RecipeError(f"scheduler_config.json: {key}: {scheduler[key]!r} cannot be followed; set it to false")
    grid = Shifted(shift=_shift(scheduler, tokens), terminal=float(scheduler.get("shift_terminal") or 0.0))
    return Contract(grid=grid, steps=steps, guidance=CFG(scale=scale))


def _shift(scheduler: Mapping[str, Any], tokens: int | None) -> float:
    """With `use_dynamic_shifting` its logarithm is linear in the number of tokens."""
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    if tokens is None:
        raise RecipeError("scheduler_config.json: use_dynamic_shifting: this family has one shift for every size")
    if scheduler.get("time_shift_type", "exponential") != "exponential":
        raise RecipeError(
            f"scheduler_config.json: time_shift_type: {scheduler['time_shift_type']!r} is not exponential"
        )
    short, long = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (tokens - short) / (long - short))
