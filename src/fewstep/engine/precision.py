"""Precision of a run's networks; losses, gradients and weights stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from fewstep.engine.settings import Settings


def autocast(settings: Settings, device: str | None = None) -> AbstractContextManager[Any]:
    """What the run asks for, on its own device or another.

    Without a cache of cast weights: a copy cast under no_grad must not serve the call that carries gradient.
    """
    where = torch.device(device or settings.device).type
    return torch.autocast(where, torch.bfloat16, enabled=settings.autocast == "bf16", cache_enabled=False)


def float32(settings: Settings, device: str | None = None) -> AbstractContextManager[Any]:
    """Inside `autocast`: for what is computed from the networks' answers."""
    return torch.autocast(torch.device(device or settings.device).type, enabled=False)
