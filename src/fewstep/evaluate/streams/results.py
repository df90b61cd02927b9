"""Results of a drift evaluation as plain data, stored as `results.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.core.atomic import write_text
from fewstep.data.base import DataError
from fewstep.evaluate.streams.figures import Curve, Kept, Range
from fewstep.evaluate.streams.switching import Switch

FILE = "results.json"
STRIPS = "strips.safetensors"
"""Film strips, uint8 `[P, T, 3, S, h, w]` under each row's name (`rolling.Rolled.strips`)."""
KIND = "fewstep drift"


@dataclass(frozen=True, kw_only=True)
class LongRow:
    """One model at one number of steps, or real clips."""

    name: str
    role: str
    """`student`, `causal`, `teacher` or `real`."""
    kind: str
    """`stream`; `new clips`: every window is a new clip, so there is one window; or `renderer`."""
    nfe_per_frame: float
    """Network evaluations that each frame goes through, with the call that commits a chunk; guidance counts twice."""
    curves: dict[str, Curve]
    """By measure: those of `rolling.READ` and `rolling.PIXELS`, and `Frechet`, if it was measured."""
    right: tuple[tuple[int, ...], ...]
    """Whether every attribute is right, for each clip and window."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A bound that a student is held to."""

    row: str
    text: str
    value: float | None
    """None if it is relative to 0."""
    interval: Range | None
    low: float
    """Smallest accepted value."""
    high: float | None = None
    """Largest accepted value; None: no limit."""

    @property
    def outcome(self) -> Literal["met", "not met", "open"]:
        """Met or not if the whole interval is within the bounds or beyond one of them; without an interval, open."""
        if self.interval is None:
            return "open"
        (low, high), most = self.interval, math.inf if self.high is None else self.high
        if low >= self.low and high <= most:
            return "met"
        return "not met" if high < self.low or low > most else "open"


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """All rows, and everything that is needed to repeat or to question them."""

    kind: str = KIND
    rows: tuple[LongRow, ...]
    claims: tuple[Claim, ...]
    switches: tuple[Switch, ...]
    frames: int
    """Frames per window: the models' own clip length."""
    fps: float
    prompts: tuple[str, ...]
    """Prompt of each clip."""
    seeds: tuple[int, ...]
    features: str
    suite: dict[str, Any]
    models: dict[str, str]
    """Fingerprint of each row's denoiser, and its number of steps."""
    machine: dict[str, Any]
    versions: dict[str, str]
    runtime: dict[str, str]
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> LongRow:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ValueError(f"there is no row {name!r}; choose from {', '.join(row.name for row in self.rows)}")
        return found[0]

    def save(self, folder: Path) -> Path:
        path = folder / FILE
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def load_drift(folder: Path | str) -> DriftReport:
    """Read the `results.json` in a folder written by `measure_drift`. DataError if another command wrote it."""
    tree = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise DataError(f"{folder}/{FILE} was not written by fewstep drift; give its output folder")
    rows = tuple(
        LongRow(**{**row, "right": _frozen(row["right"]), "curves": {k: _curve(c) for k, c in row["curves"].items()}})
        for row in tree.pop("rows")
    )
    claims = tuple(Claim(**{k: _frozen(v) for k, v in claim.items()}) for claim in tree.pop("claims"))
    switches = tuple(Switch(**{k: _frozen(v) for k, v in one.items()}) for one in tree.pop("switches"))
    return DriftReport(rows=rows, claims=claims, switches=switches, **{k: _frozen(v) for k, v in tree.items()})


def _curve(tree: dict[str, Any]) -> Curve:
    kept = tuple(Kept(**{k: _frozen(v) for k, v in one.items()}) for one in tree.pop("kept"))
    return Curve(kept=kept, **{k: _frozen(v) for k, v in tree.items()})


def _frozen(value: Any) -> Any:
    """Lists as tuples, as they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
