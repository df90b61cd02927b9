"""A folder of numbered safetensors shards that describes itself and survives interruptions.

`manifest.json`   what the folder holds, the settings that made it, whether it is complete
`shard-00000.safetensors`   rows of tensors; its header repeats the settings' hash and lists its rows
`index.jsonl`   one line per row, written when the folder is complete; read in place
`part-00000/`   such a folder again, if several processes made parts of it

Every file appears completely or not at all. A killed writer continues after its last complete shard.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.atomic import replacing
from fewstep.core.build import digest
from fewstep.core.finite import require_finite
from fewstep.core.peers import Peers
from fewstep.data.base import DataError
from fewstep.data.lines import Captions, Lines

FORMAT = 1
MANIFEST = "manifest.json"
Storage = Literal["float16", "float32"]
KINDS = {
    "latents": "Latents (fewstep prepare)",
    "pairs": "StoredPairs (fewstep pairs)",
    "texts": "a recipe's data.text_cache",
}
OPEN_SHARDS = 32
RAGGED = {"texts"}
"""Kinds whose rows differ in length: a shard has one tensor `name.row` per row, instead of all rows in `name`."""
GOES_ON = "the same command continues after the last complete file"
"""Message for the user who stops a preparation."""
_HEADER = "fewstep"


Row = tuple[dict[str, Any], dict[str, Tensor]]
"""A row: its entry in the index, and its tensors."""


@dataclass(frozen=True)
class Progress:
    """Progress of a long preparation: `done` of `total` videos or clips. `problem` says why `name` was skipped."""

    done: int
    total: int
    name: str
    problem: str = ""


class ShardWriter:
    """Writes rows to `folder`, `shard_size` per file. `settings` are plain values and must be the same on resume."""

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any], shard_size: int) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.folder, self.kind, self.shard_size = Path(folder), kind, shard_size
        self.manifest = claim(self.folder, kind, {**settings, "shard_size": shard_size})
        self.hash = self.manifest["settings_hash"]
        headers = [] if self.complete else self._written()
        self.rows: list[dict[str, Any]] = [row for header in headers for row in header["rows"]]
        """Rows of the complete shards."""
        self.resume: dict[str, Any] = headers[-1]["resume"] if headers else {}
        """Position that was stored with the last complete shard."""
        self.shards = len(headers)
        self.pending: list[Row] = []

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def room(self) -> int:
        """Rows that still fit into the current shard."""
        return self.shard_size - len(self.pending)

    def add(self, row: Mapping[str, Any], tensors: Mapping[str, Tensor], resume: Mapping[str, Any]) -> None:
        """Append one row. If the shard is then full, write it, with `resume` in its header."""
        for name, value in tensors.items():
            require_finite(value, f"{name} of {dict(row)} as stored ({value.dtype})")
        self.pending.append((dict(row), {name: value.detach().cpu() for name, value in tensors.items()}))
        if len(self.pending) == self.shard_size:
            self._flush(resume)

    def finish(self, resume: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Write the remaining rows, the index and the final manifest with `facts`; return the manifest."""
        if self.pending:
            self._flush(resume)
        with writing(self.folder / "index.jsonl") as draft, draft.open("w", encoding="utf-8") as index:
            index.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.manifest |= {"complete": True, "rows": len(self.rows), "shards": self.shards, **facts}
        _write_manifest(self.folder, self.manifest)
        return self.manifest

    def _flush(self, resume: Mapping[str, Any]) -> None:
        rows = [{"shard": self.shards, "row": i, **row} for i, (row, _) in enumerate(self.pending)]
        tensors = _ragged(self.pending) if self.kind in RAGGED else _stacked(self.pending)
        # Only one key: several keys would have a different order, and the file different bytes, in each run.
        header = {_HEADER: json.dumps({"hash": self.hash, "resume": dict(resume), "rows": rows})}
        with writing(self.folder / shard_name(self.shards)) as draft:
            save_file(tensors, draft, metadata=header)
        self.rows += rows
        self.shards += 1
        self.pending = []

    def _written(self) -> list[dict[str, Any]]:
        """Headers of the complete shards, in order."""
        headers: list[dict[str, Any]] = []
        while (path := self.folder / shard_name(len(headers))).is_file():
            with _open(path) as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            if header.get("hash") != self.hash:
                raise DataError(f"{path} was not made with these settings; delete {self.folder} and start again")
            headers.append(header)
        return headers


class PartedWriter:
    """A folder of `count` parts. Each part is written by one of the `peers`, so the result does not depend on their number."""

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any], count: int, peers: Peers) -> None:
        self.folder, self.kind, self.settings, self.count = Path(folder), kind, dict(settings), count
        with peers.in_turn():
            self.manifest = claim(self.folder, kind, {**settings, "parts": count})
        self.mine = peers.share(range(count))
        """Numbers of the parts that this process writes."""

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    def part(self, number: int, shard_size: int) -> ShardWriter:
        return ShardWriter(self.folder / part_name(number), self.kind, {**self.settings, "part": number}, shard_size)

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Manifests of the parts. DataError if a part is not complete."""
        return (read_manifest(self.folder / part_name(number), self.kind) for number in range(self.count))

    def finish(self, **facts: Any) -> None:
        """Make one index of all parts and write the final manifest with `facts`. Only one process may call it."""
        shards = [part["shards"] for part in self.manifests()]
        rows = 0
        with writing(self.folder / "index.jsonl") as draft, draft.open("w", encoding="utf-8") as index:
            for number in range(self.count):
                for line in Lines(self.folder / part_name(number) / "index.jsonl"):
                    index.write(f'{{"part": {number}, {line[1:]}\n')
                    rows += 1
        self.manifest |= {"complete": True, "rows": rows, "shards": sum(shards), "shards_of_parts": shards, **facts}
        _write_manifest(self.folder, self.manifest)


class ShardReader:
    """Rows of a complete folder by number, read from disk on request. DataError if the folder is not complete."""

    def __init__(self, folder: str | Path, kind: str) -> None:
        self.folder, self.kind = Path(folder), kind
        self.manifest = read_manifest(folder, kind)
        self.index = Lines(self.folder / "index.jsonl")
        self.captions = Captions(self.index)
        absent = next((path for path in self._paths() if not path.is_file()), None)
        if absent is not None or len(self.index) != self.manifest["rows"]:
            gap = f"{self.manifest['rows'] - len(self.index)} lines of index.jsonl" if absent is None else absent.name
            raise DataError(f"{self.folder} lacks {gap}; copy the folder again, or delete it and make it again")
        self._open: dict[Path, Any] = {}

    def check(self) -> None:
        """DataError names a shard that is cut short or is not a safetensors file. Reads headers only."""
        for path in self._paths():
            _open(path)

    def __len__(self) -> int:
        return len(self.index)

    def row(self, number: int) -> dict[str, Any]:
        """The index entry of a row: its caption and its origin."""
        row: dict[str, Any] = json.loads(self.index[number])
        return row

    def read(self, name: str, indices: Sequence[int]) -> Tensor:
        """Tensor `name` of these rows, stacked, float32, in main memory."""
        rows = [self.row(i) for i in indices]
        return torch.stack([self._shard(self._path(row)).get_slice(name)[row["row"]] for row in rows]).float()

    def read_ragged(self, name: str, row: Mapping[str, Any]) -> Tensor:
        """Tensor `name` of a row of a `RAGGED` kind, as stored. Earlier versions stored such rows stacked, with padding."""
        shard, own = self._shard(self._path(row)), f"{name}.{row['row']}"
        stored: Tensor = shard.get_tensor(own) if own in shard.keys() else shard.get_slice(name)[row["row"]]  # noqa: SIM118
        return stored

    def _path(self, row: Mapping[str, Any]) -> Path:
        return self.folder / (part_name(row["part"]) if "part" in row else "") / shard_name(row["shard"])

    def _paths(self) -> Iterator[Path]:
        """Paths of all shards."""
        for part, shards in enumerate(self.manifest.get("shards_of_parts", ())):
            yield from (self._path({"part": part, "shard": shard}) for shard in range(shards))
        if "shards_of_parts" not in self.manifest:
            yield from (self._path({"shard": shard}) for shard in range(self.manifest["shards"]))

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[path] = _open(path)
        return self._open[path]


def _stacked(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {name: torch.stack([tensors[name] for _, tensors in rows]).contiguous() for name in rows[0][1]}


def _ragged(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {f"{name}.{i}": value.contiguous() for i, (_, tensors) in enumerate(rows) for name, value in tensors.items()}


def is_complete(folder: Path) -> bool:
    path = folder / MANIFEST
    return path.is_file() and bool(_manifest(path)["complete"])


def claim(folder: Path, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a folder begun with these settings, or a new manifest. DataError if the settings differ."""
    settings = json.loads(json.dumps(settings))
    path, hashed = folder / MANIFEST, digest(settings)
    if path.is_file():
        manifest = _manifest(path)
        if manifest["kind"] != kind:
            raise DataError(f"{folder} holds {manifest['kind']}, not {kind}; give another output folder")
        if manifest.get("settings_hash") != hashed:
            raise DataError(
                f"{folder} was begun with other settings ({_difference(manifest, kind, settings)}). "
                "Repeat those settings to continue, give another output folder, or delete this one."
            )
        return manifest
    if any(folder.glob("shard-*.safetensors")):
        raise DataError(f"{folder} has shards but no manifest.json; give another folder, or delete this one")
    manifest = {
        "format": FORMAT, "kind": kind, "complete": False,
        "settings": settings, "settings_hash": hashed, "versions": _versions(),
    }  # fmt: skip
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with writing(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`replacing`, with a DataError that says what to do if the disk is full or gone."""
    try:
        with replacing(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be written: {error}. Files written before it are complete. Correct the cause, and run the same "
            "command again to continue."
        ) from error


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a complete folder of `kind` (a key of `KINDS`). Otherwise a DataError that says what to do."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no manifest.json; give a folder made for {KINDS[kind]}")
    manifest = _manifest(path)
    if manifest["kind"] != kind:
        use = KINDS.get(manifest["kind"], "another fewstep version")
        raise DataError(f"{folder} holds {manifest['kind']}, not {kind}. It is read by {use}.")
    if manifest["format"] != FORMAT:
        raise DataError(f"{folder} has format {manifest['format']}, and this version reads {FORMAT}; make it again")
    if not manifest["complete"]:
        raise DataError(f"{folder} is not complete: making it was interrupted. Run the same command again to continue.")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest. DataError if the file is not one."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["kind"], manifest["format"], manifest["complete"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); delete {path.parent} and make it again") from None
    return manifest


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}); delete its folder and make it again") from None


def _difference(manifest: Mapping[str, Any], kind: str, settings: Mapping[str, Any]) -> str:
    """The settings that differ, as `height: there 64, here 96`."""
    there = _flat({"kind": manifest.get("kind"), **manifest.get("settings", {})})
    here = _flat({"kind": kind, **settings})
    keys = [key for key in there | here if there.get(key) != here.get(key)]
    return "; ".join(f"{key}: there {_short(there.get(key))}, here {_short(here.get(key))}" for key in keys)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("torch", "av", "safetensors")}
