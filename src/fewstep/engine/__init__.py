"""Runs a method: networks, optimisers, the loop, checkpoints, logs."""

from fewstep.engine.checkpoint import CheckpointError
from fewstep.engine.loop import Run, train
from fewstep.engine.probe import Probe, WorldProbe
from fewstep.engine.settings import Health, Optim, Parallel, Settings

__all__ = ["CheckpointError", "Health", "Optim", "Parallel", "Probe", "Run", "Settings", "WorldProbe", "train"]
