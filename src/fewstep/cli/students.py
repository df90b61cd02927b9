"""`fewstep import`: public few-step weights become students."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides


@dataclass(frozen=True)
class Import(Command):
    """Make a student of public few-step weights, with the sampling contract that their authors describe in prose.

    `fewstep list students` prints the systems that are known."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Weights: a LoRA, a file of weights (.safetensors, .pt), a folder with one or with a file for each of two experts, or a
    whole model in diffusers' layout (a folder or its hub name)."""
    output: Path
    """Folder to write the student to. It must not exist, or it must be empty."""
    system: Annotated[str | None, arg(name="as")] = None
    """Known system (default: told by the name of SOURCE, or by its tensors)."""
    base: str | None = None
    """Model that the weights belong to: a folder in diffusers' layout, or its hub name (default: the system's own)."""
    steps: int | None = None
    """Number of sampling steps (default: from the name of the file, or the system's own)."""
    num_frames: int | None = None
    """Frames per clip (default: the system's, or the base's)."""
    height: int | None = None
    """Height of the clips in pixels (default: the system's, or the base's)."""
    width: int | None = None
    """Width of the clips in pixels (default: the system's, or the base's)."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import imported

        return imported.import_student(self)
