"""Precision of a run's networks; losses, gradients and weights stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from fewstep.engine.settings import Settings


def autocast(settings: Settings, device: str | None = None) -> AbstractContextManager[Any]:
    """A context with the precision of `settings.autocast`, on the run's device or another one.

    It does not cache converted weights: a copy made under no_grad must not be used by a call that needs gradients.
    """
    where = torch.device(device or settings.device).type
    return torch.autocast(where, torch.bfloat16, enabled=settings.autocast == "bf16", cache_enabled=False)


def float32(settings: Settings, device: str | None = None) -> AbstractContextManager[Any]:
    """A context inside `autocast` for float32: what is computed from the networks' outputs."""
    return torch.autocast(torch.device(device or settings.device).type, enabled=False)
