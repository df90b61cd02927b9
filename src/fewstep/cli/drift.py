"""`fewstep drift` with its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Overrides, Runs


@dataclass(frozen=True)
class Drift(Runs):
    """Measure whether streaming students drift: clips of many times their length, window by window, and switched prompts.

    On prompts of the built-in world. The teacher and real clips are measured beside them."""

    students: Positional[Annotated[tuple[str, ...], arg(metavar="STUDENT")]]
    """One or more students: fewstep folders."""
    output: Path
    """Folder to write results.json and drift.html to. A stopped command continues after its finished rows."""
    teacher: str = "world"
    """Bidirectional teacher: a folder or `world`. It is measured at its own steps, and at the students' calls per frame."""
    causal: str | None = None
    """Undistilled causal model, measured at the students' number of steps (default: none)."""
    times: tuple[int, ...] = (1, 4, 20)
    """Lengths to compare, in multiples of the models' own clip length. The last one is generated."""
    prompts: int = 24
    """Number of prompts."""
    seeds: int = 1
    """Clips per prompt."""
    seed: int = 2026
    """Seed that draws the prompts and the noise."""
    num_inference_steps: int | None = None
    """Sampling steps of the students (default: from their cards)."""
    features: str = "auto"
    """Features for the distance, as for fewstep evaluate."""
    batch: int = 8
    """Prompts whose clips are generated at once."""
    shown: int = 6
    """Prompts with film strips on the page: those that drift most."""
    no_switch: bool = False
    """Leave out the switched prompts."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import drifting

        return drifting.drift(self)
