"""Training data: `Data`, a frozen description that says what it provides, and `Source`, which gives batches by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar, Protocol

from fewstep.core import Batch, Rng
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card

REMEDIES = {
    "prompts": "Prompts",
    "x0": "Latents (fewstep prepare), Videos or WorldClips",
    "low": "Videos or WorldClips",
    "frames": "Videos or WorldClips",
    "pairs": "StoredPairs (fewstep pairs)",
    "labels": "WorldClips",
    "later": "WorldScripts",
}
"""The fields of Batch a method may need, and the data that provide each."""


class DataError(ValueError):
    """Data do not fit the method or the model, or cannot be read. The message says what to do."""


class Source(Protocol):
    """Opened data. A batch is a function of `rng`, so a source keeps no position, and a run can resume at any step."""

    def batch(self, size: int, rng: Rng) -> Batch:
        """`size` samples for step `rng.step` and place `rng.place`, on `rng.device`."""
        ...


class Wants(Protocol):
    """Anything that reads batches; every Method is one."""

    @property
    def needs(self) -> frozenset[str]: ...


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """A frozen description of training data. Building one reads nothing."""

    provides: ClassVar[frozenset[str]]
    """Fields of Batch that it can fill. They must cover `Method.needs`."""

    @property
    def text_cache(self) -> str:
        """Folder for the text states of all prompts, which are encoded when the data are opened. Empty: no folder; each
        prompt is encoded when it is first drawn.

        Most data have a field of this name.
        """
        return ""

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip, if the description has such a field; None: the model's number."""
        return None

    def check_card(self, card: Card) -> None:  # noqa: B027 - most data fit every model
        """Refuse (DataError) data that cannot fit the model's card. Called before weights are loaded or files are written."""

    def check(self, model: VideoModel) -> None:  # noqa: B027 - most data fit every model
        """Refuse (DataError) data that were made for another model. Reads manifests and fingerprints only."""

    @abstractmethod
    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        """A source that fills `needs`. `model` encodes text and pixels. DataError if that is impossible."""


def require(data: Data | type[Data], wants: Wants | AbstractSet[str]) -> None:
    """Refuse (DataError) data that lack a field that a method needs. Reads class variables only, so it is fast.

    `wants` is a method, or a set of field names.
    """
    needs, who = (wants, "this method") if isinstance(wants, AbstractSet) else (wants.needs, type(wants).__name__)
    unknown = sorted(set(needs) - REMEDIES.keys())
    if unknown:
        raise DataError(f"{who} needs {_listed(unknown)}, which no batch has; the fields are {_listed(REMEDIES)}")
    missing = [field for field in REMEDIES if field in needs and field not in data.provides]
    if missing:
        name = data.__name__ if isinstance(data, type) else type(data).__name__
        use = "; ".join(f"for {field}: {REMEDIES[field]}" for field in missing)
        use = REMEDIES[missing[0]] if len(missing) == 1 else use
        raise DataError(f"{who} needs {_listed(missing)}; {name} provides {_listed(data.provides)}. Use {use}.")


def _listed(names: object) -> str:
    return ", ".join(sorted(names))  # type: ignore[call-overload]
