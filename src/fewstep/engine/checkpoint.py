"""Checkpoints: a run's whole state on disk. A killed run resumes bit for bit, also with another number of processes.

One folder per checkpoint: a folder per component (`student`, `student.optim`, `ema`, ...) and `state.json`. Tensors are
written by torch.distributed.checkpoint in its safetensors format: every process writes its own shards, and later reads what
it needs, whatever the number of processes was. Nothing is unpickled: files hold tensors, `state.json` holds plain values.
A folder is written under a temporary name and renamed at the end: a folder with its final name is always complete.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fewstep.core.atomic import discard, draft_of, replacing_folder
from fewstep.core.env import place
from fewstep.core.stamp import stamp_of

PREFIX = "step-"
FILE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is incomplete or belongs to another run."""


@dataclass(frozen=True)
class RunState:
    """Everything a run owns: tensors by component (shared with the run), and plain values (the run's identity, health).

    The learning rate and the position in the data are functions of `step`; random numbers have no state.
    """

    step: int
    components: dict[str, dict[str, Tensor]]
    values: dict[str, Any]

    def staged(self) -> RunState:
        """A copy on the CPU, shard by shard, which later steps do not change."""
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            for name, tensors in self.components.items()
        }
        return replace(self, components=copies, values=json.loads(json.dumps(self.values)))

    def save(self, folder: Path, group: dist.ProcessGroup | None = None) -> Path:
        """Write `folder/step-NNNNNN` completely or not at all, and return it. With a group, all its processes must call."""
        target = folder / f"{PREFIX}{self.step:06d}"
        leads = group is None or dist.get_rank(group) == 0
        with replacing_folder(target) if leads else nullcontext(draft_of(target)) as draft:
            if group is not None:
                dist.barrier(group)  # the draft is empty and nobody has begun to write
            for name, tensors in self.components.items():
                write_component(tensors, draft / name, group)
            if leads:
                listing = {
                    name: {file.name: stamp_of(file) for file in _files(draft / name)} for name in self.components
                }
                state = {"step": self.step, "components": listing, "values": self.values}
                (draft / FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read a whole checkpoint into this process, also one that several processes wrote. Errors as in
        `Checkpoint.open`."""
        saved = Checkpoint.open(folder)
        components = {name: saved.blank(name) for name in saved.components}
        for name, tensors in components.items():
            saved.read(name, tensors)
        return cls(saved.step, components, saved.values)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. Only its `state.json` has been read."""

    folder: Path
    step: int
    components: tuple[str, ...]
    values: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a checkpoint. CheckpointError names a file that is missing, cut short, unreadable or changed."""
        file = folder / FILE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            listing: Mapping[str, Mapping[str, str]] = state["components"]
            opened = cls(folder, state["step"], tuple(listing), state["values"])
            for name, stamps in listing.items():
                for file in (folder / name / shard for shard in stamps):
                    if _changed(file, stamps[file.name]):
                        raise ValueError("it is not the file that was saved here")
        except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is missing, cut short or unreadable ({error}). "
                f"Delete {folder} to resume from the checkpoint before it, or from the start if there is none."
            ) from error
        known = {folder / FILE, *(folder / name / shard for name, stamps in listing.items() for shard in stamps)}
        if foreign := sorted({path for path in folder.rglob("*") if path.is_file()} - known):
            raise CheckpointError(f"{foreign[0]} does not belong to this checkpoint; delete that file")
        return opened

    def require(self, identity: Mapping[str, str], components: Collection[str]) -> None:
        """Refuse (CheckpointError) if the checkpoint belongs to another run or has other components."""
        theirs: dict[str, str] | None = self.values.get("identity")
        if not theirs:
            raise CheckpointError(f"{self.folder / FILE} does not say to which run it belongs; delete {self.folder}")
        pairs = {key: (was, identity.get(key, "absent")) for key, was in theirs.items()}
        changed = [f"{key} was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
        if changed:
            raise CheckpointError(
                f"{self.folder} belongs to another run ({'; '.join(changed)}). "
                "Give another output folder, or delete this one."
            )
        if odd := sorted(set(components) ^ set(self.components)):
            raise CheckpointError(
                f"{self.folder} was written by another version of fewstep: it lacks or adds components "
                f"({', '.join(odd)}). Give another output folder."
            )

    def shapes(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor of a component."""
        if not (self.folder / name).is_dir():
            return {}
        stored = HuggingFaceStorageReader(str(self.folder / name)).read_metadata().state_dict_metadata
        return {key: (entry.size, entry.properties.dtype) for key, entry in stored.items()}  # type: ignore[union-attr]

    def blank(self, name: str) -> dict[str, Tensor]:
        """New tensors on the CPU, into which `read` can read a whole component."""
        return {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in self.shapes(name).items()}

    def read(self, name: str, into: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Fill the tensors of a component in place; of a sharded component, this process' part. With a group, all its
        processes must call."""
        stored = self.shapes(name)
        odd = sorted(into.keys() ^ stored.keys())
        odd += [key for key, tensor in into.items() if key in stored and tensor.shape != stored[key][0]]
        if odd:
            raise CheckpointError(
                f"{self.folder / name} belongs to another network: {', '.join(odd[:4])} do not match. "
                "Give another output folder."
            )
        if into:
            self._fill(name, into, group)

    def part(
        self, name: str, wanted: Callable[[str], bool], group: dist.ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a component that are `wanted` by their names, on the CPU. Each process may want others; with a group,
        all its processes must call."""
        into = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in self.shapes(name).items() if wanted(key)}
        self._fill(name, into, group)
        return into

    def _fill(self, name: str, into: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        reader = HuggingFaceStorageReader(str(self.folder / name))
        _expect_one_process()
        dcp.load(dict(into), storage_reader=reader, process_group=group, no_dist=group is None)


class Saver:
    """Writes checkpoints in a thread while training goes on, one at a time, and keeps the newest `keep`.

    `save` returns as soon as the state is copied; `wait`, or the next `save`, raises the error if writing failed.
    """

    def __init__(self, folder: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self._leads = group is None or dist.get_rank(group) == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)  # finish a checkpoint that was begun, also when the run fails
        if kind is None:  # otherwise the run's own error matters more
            self.wait()

    def save(self, state: RunState) -> None:
        self.wait()
        self._pending = self._thread.submit(self._write, state.staged())

    def wait(self) -> None:
        """Wait until the last checkpoint is complete."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: RunState) -> None:
        state.save(self.folder, self.group)
        if self._leads:
            prune(self.folder, self.keep)


def write_component(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write one safetensors file for each process that holds a part of the component; each file is flushed to the disk."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _expect_one_process()
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def _expect_one_process() -> None:
    """Silence the warning that only one process saves or loads. For good: a thread must not restore filters that others see."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = {path: path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        discard(old)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _changed(file: Path, stamp: str) -> bool:
    """Whether a file differs from its stamp. The first process of a machine reads every byte; the others compare the length."""
    if place().local_rank:
        return file.stat().st_size != int(stamp.split()[0])
    return stamp_of(file) != stamp
