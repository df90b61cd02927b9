"""Finished rows of an evaluation on disk: after an interruption it resumes with the next row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewstep.core.atomic import replacing
from fewstep.core.build import digest
from fewstep.evaluate.measure import Measured
from fewstep.evaluate.results import FILE, load_report
from fewstep.evaluate.sampling import Bench
from fewstep.evaluate.suite import Entry

FOLDER = "rows"
PAGE = "report.html"


@dataclass(frozen=True)
class RowFiles:
    """Files of the finished rows of one evaluation, by the row's name."""

    paths: Mapping[str, Path]

    def said(self) -> str:
        """What happens if the user starts a stopped evaluation again."""
        count = sum(path.is_file() for path in self.paths.values())
        which = "1 finished row is" if count == 1 else f"{count} finished rows are"
        return f"{which} kept, and the same command continues after that"

    def delete(self) -> None:
        """Delete the files of these rows, once the report holds all of them. Files of other evaluations stay."""
        for path in self.paths.values():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            next(iter(self.paths.values())).parent.rmdir()


@dataclass(frozen=True)
class KeptRows(RowFiles):
    """The finished rows of one evaluation: one file per row, by the row's name."""

    @classmethod
    def of(cls, rows: Sequence[Entry], bench: Bench, output: Path) -> KeptRows:
        """The files for these rows. Other weights, prompts or settings get other files."""
        weights: dict[int, dict[str, str]] = {}
        paths: dict[str, Path] = {}
        for entry in rows:
            if id(entry.model) not in weights:  # a fingerprint reads all weights, so compute it once
                weights[id(entry.model)] = {name: entry.model.fingerprint(name) for name in entry.model.parts}
            facts = {
                "row": entry.name, "weights": weights[id(entry.model)], "contract": repr(entry.contract),
                "suite": repr(bench.suite), "frames": bench.num_frames, "prompts": bench.cases.prompts,
                "features": bench.features.name, "device": bench.device.type, "runtime": repr(bench.runtime),
            }  # fmt: skip
            paths[entry.name] = output / FOLDER / f"{digest(facts)}.safetensors"
        return cls(paths)

    def read(self, name: str) -> Measured | None:
        """The figures of a row; None if it was not measured, or if its file is damaged."""
        if not self.paths[name].is_file():
            return None
        try:
            with safe_open(self.paths[name], framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
                seconds = float((file.metadata() or {})["seconds"])
        except (SafetensorError, KeyError, ValueError):
            return None
        absent = {field.name: None for field in fields(Measured)}
        return Measured(**{**absent, **tensors, "seconds": seconds})

    def write(self, name: str, measured: Measured) -> None:
        tensors = {key: value.contiguous() for key, value in vars(measured).items() if isinstance(value, torch.Tensor)}
        with replacing(self.paths[name]) as draft:
            save_file(tensors, draft, metadata={"seconds": repr(measured.seconds)})


def require_own(output: Path, models: Mapping[str, str], suite: Mapping[str, Any]) -> None:
    """Refuse (FileExistsError) to overwrite files that this evaluation did not write."""
    page, results = output / PAGE, output / FILE
    if not results.exists():
        if page.exists():
            raise FileExistsError(f"{page} exists, but its {FILE} does not; give another output folder")
        return
    try:
        there = load_report(output)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        raise FileExistsError(f"{results} was not written by fewstep evaluate; give another output folder") from None
    if there.models != models or there.suite != json.loads(json.dumps(suite)):
        changed = "models" if there.models != models else "prompts or settings"
        raise FileExistsError(
            f"{results} has figures for other {changed}; give another output folder, or delete {results} and {page}"
        )
