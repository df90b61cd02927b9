"""Disk space of a run, computed before its first iteration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.core.disk import require_space, size_of
from fewstep.engine.optim import state_bytes
from fewstep.engine.run import Run
from fewstep.models.results import RESULTS

WRITTEN = ("checkpoints", "best", *RESULTS)
"""Folders of a run that take most of its space."""


def require_disk(run: Run) -> None:
    """Refuse (OSError) a run whose checkpoints and students do not fit on the disk of its folder."""
    settings = run.settings
    saved = 1 + (settings.steps // settings.save_every if settings.save_every else 0)
    checkpoints = min(saved, settings.keep_last + 1)  # the oldest is deleted after a new one is written
    keeps_best = run.probe is not None or (run.monitor is not None and run.monitor.health.keep_best)
    needed = checkpoints * checkpoint_bytes(run) + (2 if keeps_best else 1) * student_bytes(run)
    held = sum(size_of(run.output / name) for name in WRITTEN)
    require_space(run.output, needed - held, "this run's checkpoints and students")


def checkpoint_bytes(run: Run) -> int:
    """Bytes of the tensors in one checkpoint: networks that change, and their optimisers' moments."""
    moments = sum(state_bytes(optimizer.network, optimizer.optim) for optimizer in run.optimizers.values())
    networks = sum(_bytes(network.state_dict()) for network in run.changing.values())
    return networks + moments


def student_bytes(run: Run) -> int:
    """Bytes of the weights in a student's folder; parts that its card only names are not copied."""
    named = run.model.card.sources.keys() - {run.method.part}
    return sum(_bytes(part.state_dict()) for name, part in run.model.parts.items() if name not in named)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
