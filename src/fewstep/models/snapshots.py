"""Where a live stream is, as a file: it goes on in another process or on another day, bit for bit.

One safetensors file: the tensors by number, and in the header what they belong to and which model made them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.attention import Keep, KVCache
from fewstep.core.atomic import replacing
from fewstep.core.build import dump
from fewstep.diffusion import NoisePath, Prediction
from fewstep.models.stored import open_tensors
from fewstep.streaming import Chunks, Control, Fade, Flying, LiveSnapshot, Seen, Snapshot

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

_HEADER = "fewstep.stream"
_HOLDERS: dict[str, type] = {
    kind.__name__: kind for kind in (LiveSnapshot, Snapshot, Seen, KVCache, Fade, Flying, Prediction, Control)
}
_ON_CPU = frozenset({"positions", "start", "rows"})
"""Fields of a memory that stay on the CPU."""


def save_snapshot(snapshot: LiveSnapshot, model: VideoModel, path: Path | str) -> Path:
    """Write where a stream of `model` is. What is in the file: prompts, seeds, latents, keys and values; no weights."""
    tensors: list[Tensor] = []
    header = {"model": _identity(model), "stream": _written(snapshot, tensors)}
    with replacing(Path(path)) as draft:
        save_file({str(i): x for i, x in enumerate(tensors)}, draft, {_HEADER: json.dumps(header)})
    return Path(path)


def load_snapshot(path: Path | str, model: VideoModel) -> LiveSnapshot:
    """Read what `save_snapshot` wrote. ValueError for a file of something else, and for one that another model made."""
    file = open_tensors(Path(path))
    text = (file.metadata() or {}).get(_HEADER)
    if text is None:
        raise ValueError(f"{path} is no snapshot of a stream; give a file that fewstep stream --snapshot wrote")
    header, here = json.loads(text), json.loads(json.dumps(_identity(model)))
    if unlike := [name for name, value in header["model"].items() if value != here.get(name)]:
        raise ValueError(
            f"{path} was made by {header['model']['name']!r}, which differs from {model.card.name!r} in {', '.join(unlike)}; "
            "a stream goes on only with the model that began it"
        )
    return _Reading(file, model).value(header["stream"])


def _identity(model: VideoModel) -> dict[str, Any]:
    """What the rest of a stream depends on."""
    prints = {part: model.fingerprint(part) for part in ("denoiser", "text", "codec")}
    return {"name": model.card.name, **prints, "contract": dump(model.card.contract)}


def _written(value: Any, tensors: list[Tensor]) -> Any:
    """A plain tree; tensors are put aside and named by number."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().clone(memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Keep):
        return {"keep": type(value).__name__}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_written(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _written(item, tensors)] for key, item in value.items()]}
    if isinstance(value, NoisePath):
        return {"path": type(value).__name__}
    name = type(value).__name__
    if _HOLDERS.get(name) is not type(value):
        raise ValueError(
            f"a stream that remembers a {name} cannot be written to a file; its codec must remember tensors in tuples"
        )
    return {name: {field.name: _written(getattr(value, field.name), tensors) for field in fields(value)}}


@dataclass(frozen=True)
class _Reading:
    """A snapshot's file, and the model that goes on."""

    file: Any
    model: VideoModel

    def value(self, tree: Any, name: str = "") -> Any:
        if not isinstance(tree, dict):
            return tree
        ((kind, inner),) = tree.items()
        if kind == "tensor":
            tensor = self.file.get_tensor(str(inner))
            return tensor if name in _ON_CPU else tensor.to(self.model.device)
        if kind == "keep":  # the model's own: the contracts are equal
            return Chunks.of(self.model.reader, self.model.card.contract).begin().keep
        if kind == "path":  # likewise
            return self.model.denoiser.path
        if kind == "dict":
            return {key: self.value(item) for key, item in inner}
        if kind in ("tuple", "list"):
            return {"tuple": tuple, "list": list}[kind](self.value(item) for item in inner)
        if kind not in _HOLDERS:
            raise ValueError(
                f"this snapshot has a {kind!r}, which this version of fewstep does not know; update fewstep"
            )
        return _HOLDERS[kind](**{field: self.value(item, field) for field, item in inner.items()})
