"""Histories: what a chunk reads of earlier chunks in training on stored clips. One per file, listed in HISTORIES."""

from fewstep.methods.histories.base import History, WholeClip
from fewstep.methods.histories.diffusion_forced import DiffusionForced
from fewstep.methods.histories.moving_buffer import MovingBuffer
from fewstep.methods.histories.teacher_forced import TeacherForced

HISTORIES: tuple[type[History], ...] = (WholeClip, DiffusionForced, TeacherForced, MovingBuffer)

__all__ = ["HISTORIES", "DiffusionForced", "History", "MovingBuffer", "TeacherForced", "WholeClip"]
