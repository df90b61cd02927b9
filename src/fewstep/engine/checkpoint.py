"""A run's whole state on disk, from which a killed run goes on bit for bit.

One folder per checkpoint: a safetensors file per component (`student`, `student.optim`, `ema`, ...) and `state.json`.
Folders are written beside and renamed at the end: whatever carries its final name is complete, whenever a kill came.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.atomic import discard, replacing_folder

PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint is incomplete or belongs to another run."""


@dataclass(frozen=True)
class RunState:
    """Everything a run owns: tensors by component, and plain values (what run it is, best scores)."""

    step: int
    components: dict[str, dict[str, Tensor]]
    values: dict[str, Any]

    def save(self, folder: Path) -> Path:
        """Write `folder/step-NNNNNN`, whole or not at all, and return it."""
        target = folder / f"{PREFIX}{self.step:06d}"
        with replacing_folder(target) as draft:
            for name, tensors in self.components.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft / f"{name}.safetensors")
            state = {"step": self.step, "components": sorted(self.components), "values": self.values}
            (draft / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read one checkpoint. CheckpointError names the file that is missing, cut short or unreadable."""
        file = folder / "state.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            components = {}
            for name in state["components"]:
                file = folder / f"{name}.safetensors"
                components[name] = load_file(file)
            return cls(state["step"], components, state["values"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} is missing, cut short or unreadable ({error}). "
                f"Delete {folder} to go on from the checkpoint before it, or from the start if there is none."
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = {path: path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        discard(old)
