"""What an evaluation has measured so far, on disk: after an interruption it goes on with the next row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
from fewstep.models.bundle import fingerprint

FOLDER = "rows"
PAGE = "report.html"


@dataclass(frozen=True)
class KeptRows:
    """The finished rows of an evaluation that goes to `output`."""

    output: Path
    bench: Bench

    def read(self, entry: Entry) -> Measured | None:
        """The row as it was measured; None where it was not, or the weights, the prompts or anything else was another."""
        path = self._path(entry)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                seconds = float((file.metadata() or {})["seconds"])
        except (SafetensorError, KeyError, ValueError):
            return None  # damaged: it is measured again
        absent = {field.name: None for field in fields(Measured)}
        return Measured(**{**absent, **tensors, "seconds": seconds})

    def write(self, entry: Entry, measured: Measured) -> None:
        tensors = {
            name: value.contiguous() for name, value in vars(measured).items() if isinstance(value, torch.Tensor)
        }
        with replacing(self._path(entry)) as draft:
            save_file(tensors, draft, metadata={"seconds": repr(measured.seconds)})

    def said(self) -> str:
        """For the person who stops an evaluation."""
        count = len(list((self.output / FOLDER).glob("*.safetensors")))
        return (
            f"{count} finished {'row is' if count == 1 else 'rows are'} kept, and the same command goes on after that"
        )

    def delete(self) -> None:
        """When the report is written, which has all of it."""
        shutil.rmtree(self.output / FOLDER, ignore_errors=True)

    def _path(self, entry: Entry) -> Path:
        bench, model = self.bench, entry.model
        facts = {
            "row": entry.name, "weights": {name: fingerprint(part) for name, part in model.parts.items()},
            "contract": repr(entry.contract), "suite": repr(bench.suite), "frames": bench.num_frames,
            "prompts": bench.cases.prompts, "features": bench.features.name, "device": bench.device.type,
        }  # fmt: skip
        return self.output / FOLDER / f"{digest(facts)}.safetensors"


def require_own(output: Path, models: Mapping[str, str], suite: Mapping[str, Any]) -> None:
    """Refuse (FileExistsError) to write over what this evaluation did not make: another's figures, or anybody's files."""
    page, results = output / PAGE, output / FILE
    if not results.exists():
        if page.exists():
            raise FileExistsError(f"{page} is there and no {FILE} that it is the page of; give another output folder")
        return
    try:
        there = load_report(output)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        raise FileExistsError(f"{results} is not of fewstep evaluate; give another output folder") from None
    if there.models != models or there.suite != json.loads(json.dumps(suite)):
        changed = "models" if there.models != models else "prompts or settings"
        raise FileExistsError(
            f"{results} has figures of other {changed}; give another output folder, or delete {results} and {page}"
        )
