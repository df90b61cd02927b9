"""Numbers that a network reads besides time and text (`compress.ScalarInput`, `compress.FrameInput`), as conditions of clips."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.compress import FrameInput
from fewstep.core import Cond

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


def scalar_conditions(model: VideoModel, batch: int, given: Mapping[str, float]) -> dict[str, Tensor]:
    """`[batch]` for each of the `given` numbers.

    ValueError for a number that the model does not read, one that is no number, and one that it needs and is not given.
    """
    reads: Mapping[str, Any] = dict(model.denoiser.backbone.scalars) if "denoiser" in model.parts else {}
    names = ", ".join(reads) or "none"
    for name, value in given.items():
        if name not in reads:
            raise ValueError(f"scalars: {model.card.name!r} does not read {name!r}; the scalars that it reads: {names}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"scalars: {name} must be a finite number, such as 4.0, got {value!r}")
    for name, scalar in reads.items():
        if name not in given and scalar.told.default is None:
            raise ValueError(
                f"scalars: {model.card.name!r} reads {name!r}, which has no default; give it a number, such as "
                f"scalars={{{name!r}: 4.0}} (--scalar {name}=4.0)"
            )
    return {name: torch.full((batch,), float(value), device=model.device) for name, value in given.items()}


def with_blank_inputs(model: VideoModel, cond: Cond, num_frames: int | None) -> Cond:
    """Conditions with zeros for everything that the model reads besides, of clips of so many frames (None: the card's)."""
    if "denoiser" not in model.parts:
        return cond
    backbone, batch = model.denoiser.backbone, len(cond)
    cond = cond.with_extra({name: torch.zeros(batch) for name in backbone.scalars})
    told: list[FrameInput] = [signal.told for signal in backbone.signals]  # type: ignore[misc]
    frames = model.latent_shape(num_frames)[1] if told else 0
    return cond.with_extra({each.name: torch.zeros(batch, frames, each.numbers) for each in told}, framewise=True)
