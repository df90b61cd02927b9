"""What an engine needs to serve a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.models.adapters.lora_file import Names


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files of an export for one engine, and how they are served."""

    names: Names
    """How the denoiser's weights are called."""
    command: str
    """Starts the server, in the exported folder's parent."""
    request: str
    """Asks it for the clip that was trained for."""
    visited: tuple[float, ...]
    """Noise levels that the engine's scheduler visits under these files and flags, by its own formula."""
    sources: tuple[str, ...]
    """Where the facts about the engine were read: repository, file, version."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Entries of `model_index.json` in place of those of diffusers."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files, by name."""
    notes: tuple[str, ...] = ()
    """What whoever serves it must know."""
