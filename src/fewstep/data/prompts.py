"""Prompts, and first frames for image-to-video models: the data that methods without videos need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fewstep.core import Batch, Rng
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.images import PictureConditions, Pictured, require_pictures
from fewstep.data.lines import Lines
from fewstep.data.order import draw_indices
from fewstep.data.parts import Part
from fewstep.data.texts import Texts
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card


@dataclass(frozen=True, kw_only=True)
class Prompts(Data):
    """One prompt per line of a UTF-8 text file; empty lines are ignored. Clips have the model's own size.

    For an image-to-video model: a .csv or .jsonl with `caption`, `image` and, optionally, `last_image` (see `Pictured`).
    Encoded prompts and pictures are kept in main memory, up to 2 GiB of each per process.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts"})

    path: str
    text_cache: str = ""
    """Folder for the text states of all prompts. They are encoded once, before training, and read from there; the text
    encoder then needs no place on the training device. Empty: encode each prompt when it is first drawn."""
    part: Part | None = None
    """The part of the prompts that is used (MSD, 2410.23274); null: all."""

    def check_card(self, card: Card) -> None:
        require_pictures(read_prompts(self.path), card, self.path)

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        prompts = read_prompts(self.path)
        require_pictures(prompts, model.card, self.path)
        pictured = prompts if isinstance(prompts, Pictured) else None
        images = None if pictured is None else PictureConditions(model, pictured, model.card.num_frames)
        texts = Texts(model, needs, self.text_cache, prompts)
        rows = range(len(prompts)) if self.part is None else self.part.rows(prompts, texts.encode)
        return _PromptSource(model, prompts, rows, texts, images)


def read_prompts(path: str | Path) -> Sequence[str]:
    """The non-empty lines of a text file, stripped; or the captions of a .csv or .jsonl file with pictures (`Pictured`).

    DataError if the file cannot be read or has no prompts.
    """
    try:
        prompts = Pictured(path) if Path(path).suffix.lower() in (".csv", ".jsonl") else Lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Prompts reads a text file with one prompt per line.") from None
    if not prompts:
        raise DataError(f"{path} has no prompts; write one per line")
    return prompts


@dataclass(frozen=True)
class _PromptSource:
    model: VideoModel
    prompts: Sequence[str]
    rows: Sequence[int]
    """Places of the prompts that are drawn."""
    texts: Texts
    images: PictureConditions | None

    def batch(self, size: int, rng: Rng) -> Batch:
        indices = [self.rows[i] for i in draw_indices(len(self.rows), size, rng)]
        chosen = tuple(self.prompts[i] for i in indices)
        cond, uncond = self.texts(chosen, rng.device)
        if self.images is not None:
            images = self.images(indices)
            cond, uncond = (each.with_extra(images).to(rng.device) for each in (cond, uncond))
        return Batch(cond=cond, uncond=uncond, latent_shape=self.model.latent_shape(), prompts=chosen)
