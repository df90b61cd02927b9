"""TensorBoard, if it is installed."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def open_board(folder: Path, resume_step: int) -> SummaryWriter:
    """A TensorBoard writer. It hides what an earlier process logged after the checkpoint that this run resumes from."""
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
