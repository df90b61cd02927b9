"""A folder of text states for sampling: prompts that are known need no text encoder.

The states are those of `texts.store_texts`, so a folder of training (`data.text_cache`) serves sampling, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.core import Cond, dump
from fewstep.core.build import digest
from fewstep.data.base import DataError
from fewstep.data.store import MANIFEST, ShardReader, is_complete, read_manifest, writing
from fewstep.data.texts import padded, read_states, row_of, store_texts
from fewstep.models import adapters
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card, sketch
from fewstep.models.runtime import Runtime

ENCODERS = "encoders.json"
"""File in the folder: fingerprints of encoders by what their files are, so that nobody loads one to learn its fingerprint."""


class TextFolder:
    """Conditions by prompt, from all stores in `folder` that the encoder with the fingerprint `encoder` made.

    `length` is the number of tokens that the encoder gives; DataError where there are stores of other encoders only.
    """

    def __init__(self, folder: Path | str, encoder: str, length: int) -> None:
        self.folder, self.encoder, self.length = Path(folder), encoder, length
        makers = {store: read_manifest(store, "texts")["settings"]["text"] for store in _stores(self.folder)}
        if makers and encoder not in makers.values():
            raise DataError(
                f"{self.folder} holds text states of another text encoder ({', '.join(sorted(set(makers.values())))}), not of "
                f"this model's ({encoder}); give another folder"
            )
        self.readers = [ShardReader(store, "texts") for store, maker in makers.items() if maker == encoder]

    @classmethod
    def known(cls, folder: Path | str, card: Card) -> TextFolder | None:
        """That of the text encoder of a model; None where its fingerprint is not known yet."""
        encoder = card.fingerprints.get("text") or _remembered(Path(folder)).get(_identity(card))
        return cls(folder, encoder, _length(card)) if encoder else None

    def missing(self, prompts: Iterable[str]) -> tuple[str, ...]:
        """The prompts without states, each once."""
        return tuple(prompt for prompt in dict.fromkeys(prompts) if self._reader(prompt) is None)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Conditions `[B, length, width]` in main memory. KeyError for a prompt without states."""
        found = []
        for prompt in prompts:
            reader = self._reader(prompt)
            if reader is None:
                raise KeyError(prompt)
            found.append(padded(read_states(reader, prompt), self.length))
        return Cond.cat(found)

    def _reader(self, prompt: str) -> ShardReader | None:
        """The first store that has it."""
        return next((reader for reader in self.readers if row_of(reader, prompt) is not None), None)


def filled(
    folder: Path | str, card: Card, source: str, prompts: Sequence[str], *, trust: bool = False, device: str = "cpu"
) -> TextFolder:
    """The folder with states of all `prompts` for the model `source`. Its text encoder is loaded if some are missing, or if its
    fingerprint is not known yet: alone, on `device`, and only for as long as it works.
    """
    found = TextFolder.known(folder, card)
    if found is not None and not found.missing(prompts):
        return found
    alone = replace(card, parts={"text": card.parts["text"]})
    model = VideoModel.load(alone, source, trust=trust, runtime=Runtime(device=device))
    encoder = model.fingerprint("text")
    if "text" not in card.fingerprints:
        _remember(Path(folder), _identity(card), encoder)
    found = TextFolder(folder, encoder, model.text.length)
    if missing := found.missing(prompts):
        store_texts(model, missing, folder)
        found = TextFolder(folder, encoder, model.text.length)
    return found


def _length(card: Card) -> int:
    return int(sketch("text", card).length)  # type: ignore[arg-type]


def _stores(folder: Path) -> Iterator[Path]:
    """Complete stores: the folder itself, or those in it."""
    for place in (folder, *sorted(folder.glob("*/"))):
        if (place / MANIFEST).is_file() and is_complete(place):
            yield place


def _identity(card: Card) -> str:
    """What says which encoder a card names: its class and arguments, and the files of its weights, without reading them."""
    spec, source = card.parts["text"], card.sources.get("text")
    files = None if source is None else adapters.files_of(sketch("text", card), source)
    return digest({"text": dump(spec), "files": files})


def _remembered(folder: Path) -> dict[str, str]:
    path = folder / ENCODERS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and it is made again") from None
    return {str(name): str(encoder) for name, encoder in found.items()}


def _remember(folder: Path, identity: str, encoder: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = _remembered(folder) | {identity: encoder}
    with writing(folder / ENCODERS) as draft:
        draft.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
