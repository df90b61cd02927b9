"""Finished rows of a drift evaluation on disk: after an interruption it resumes with the next row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.core.atomic import replacing
from fewstep.core.build import digest
from fewstep.core.lock import FILE as LOCK
from fewstep.data.base import DataError
from fewstep.evaluate.kept import FOLDER, RowFiles
from fewstep.evaluate.streams.clips import LongClips
from fewstep.evaluate.streams.results import FILE, load_drift
from fewstep.evaluate.streams.rolling import Rolled
from fewstep.evaluate.streams.suite import DriftSuite
from fewstep.models.bundle import VideoModel

_MEASURE = "measure/"


@dataclass(frozen=True)
class KeptRolls(RowFiles):
    """The finished rows of one drift evaluation: one file per row, by the row's name."""

    @classmethod
    def of(
        cls, rows: Sequence[LongClips], suite: DriftSuite, features: str, model: VideoModel, output: Path
    ) -> KeptRolls:
        """The files for these rows. Other weights, prompts or settings get other files."""
        asked = {
            "suite": repr(suite), "features": features, "device": model.device.type, "runtime": repr(model.runtime)
        }  # fmt: skip
        return cls({
            row.name: output / FOLDER / f"{digest(asked | row.facts() | {'row': row.name})}.safetensors" for row in rows
        })  # fmt: skip

    def read(self, name: str) -> Rolled | None:
        """A finished row; None if it was not measured, or if its file is damaged."""
        try:
            tensors = load_file(self.paths[name])
            measures = {key.removeprefix(_MEASURE): x for key, x in tensors.items() if key.startswith(_MEASURE)}
            return Rolled(measures, tensors["features"], tensors["strips"])
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, name: str, rolled: Rolled) -> None:
        tensors = {_MEASURE + key: x.contiguous() for key, x in rolled.measures.items()}
        tensors |= {"features": rolled.features.contiguous(), "strips": rolled.strips.contiguous()}
        with replacing(self.paths[name]) as draft:
            save_file(tensors, draft)


def require_own(output: Path, models: Mapping[str, str], suite: Mapping[str, Any]) -> None:
    """Refuse (FileExistsError) to overwrite files that this evaluation did not write."""
    others = {path.name for path in output.iterdir()} - {LOCK, FOLDER} if output.is_dir() else set()
    if not others:
        return
    try:
        there = load_drift(output)
    except (DataError, ValueError, TypeError, KeyError, OSError):
        raise FileExistsError(
            f"{output} has files that fewstep drift did not write; give another output folder"
        ) from None
    if there.models != models or json.loads(json.dumps(suite)) != json.loads(json.dumps(there.suite)):
        changed = "models" if there.models != models else "prompts or settings"
        raise FileExistsError(
            f"{output / FILE} has figures for other {changed}; give another output folder, or delete it"
        )
