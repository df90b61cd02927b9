"""Prepared latents as training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core import Batch, Rng
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.images import require_stored
from fewstep.data.order import draw_indices
from fewstep.data.parts import Part
from fewstep.data.store import ShardReader, read_manifest
from fewstep.data.texts import Texts
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.images import image_names


@dataclass(frozen=True, kw_only=True)
class Latents(Data):
    """A folder written by `fewstep prepare`: latents and captions. Only a model with the same autoencoder can use them.

    For an image-to-video model, prepare the folder with that model: its images are the clips' own frames.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "x0"})

    path: str
    text_cache: str = ""
    """Folder for the text states of all captions, as in Prompts. Empty: encode each caption when it is first drawn."""
    part: Part | None = None
    """The part of the captions whose clips are used, as in Prompts; null: all."""

    def check_card(self, card: Card) -> None:
        settings = read_manifest(self.path, "latents")["settings"]
        cut = settings["cut"]
        there = {name: cut[name] for name in ("num_frames", "height", "width")}
        here = {name: getattr(card, name) for name in there}
        if there != here:
            raise DataError(
                f"{self.path} holds clips of {_size(there)}, but model {card.name!r} makes {_size(here)}. Prepare the "
                "videos in the model's size. For a model made from scratch, set model.num_frames, model.height and "
                "model.width to their size."
            )
        if card.fingerprints.get("codec"):
            self._compare(card.fingerprints["codec"], card)
        require_stored(settings, card, card.fingerprints.get("image", ""), self.path)

    def check(self, model: VideoModel) -> None:
        self._compare(model.fingerprint("codec"), model.card)
        image = model.fingerprint("image") if "image" in model.parts else ""
        require_stored(read_manifest(self.path, "latents")["settings"], model.card, image, self.path)

    def _compare(self, here: str, card: Card) -> None:
        there = read_manifest(self.path, "latents")["settings"]["codec"]
        if there != here:
            raise DataError(
                f"{self.path} holds latents of autoencoder {there}, but model {card.name!r} has {here}. "
                "A model needs latents of its own autoencoder: prepare the videos again with this model "
                "(fewstep prepare), or train the model whose autoencoder made them."
            )

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        self.check(model)
        reader = ShardReader(self.path, "latents")
        texts = Texts(model, needs, self.text_cache, reader.captions)
        rows = range(len(reader)) if self.part is None else self.part.rows(reader.captions, texts.encode)
        return _LatentSource(reader, rows, texts, "x0" in needs, image_names(model))


def _size(clip: dict[str, int]) -> str:
    return f"{clip['num_frames']} frames of {clip['height']} x {clip['width']}"


@dataclass(frozen=True)
class _LatentSource:
    reader: ShardReader
    rows: Sequence[int]
    """Places of the clips that are drawn."""
    texts: Texts
    wants_x0: bool
    images: tuple[str, ...]
    """Names of the conditions made from images."""

    def batch(self, size: int, rng: Rng) -> Batch:
        indices = [self.rows[i] for i in draw_indices(len(self.rows), size, rng)]
        prompts = tuple(self.reader.row(i)["caption"] for i in indices)
        images = {name: self.reader.read(name, indices) for name in self.images}
        cond, uncond = (each.with_extra(images).to(rng.device) for each in self.texts(prompts, rng.device))
        c, f, h, w = self.reader.manifest["latent_shape"]
        x0 = self.reader.read("latents", indices).to(rng.device) if self.wants_x0 else None
        return Batch(cond=cond, uncond=uncond, latent_shape=(c, f, h, w), prompts=prompts, x0=x0)
