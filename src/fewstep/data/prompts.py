"""A text file of prompts: all that data-free methods need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fewstep.core import Batch, Rng
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.lines import Lines
from fewstep.data.order import draw_indices
from fewstep.data.texts import Texts
from fewstep.models.bundle import Card, VideoModel


@dataclass(frozen=True, kw_only=True)
class Prompts(Data):
    """One prompt per line of a UTF-8 text file; empty lines are ignored. Clips have the model's own size."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts"})

    path: str
    text_cache: str = ""
    """Folder for the text states of all prompts: encoded once, before training, and read from there. The text encoder is
    then not on the device that trains. Empty encodes each prompt when it is first drawn."""

    def check_card(self, card: Card) -> None:
        read_prompts(self.path)

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        prompts = read_prompts(self.path)
        return _PromptSource(prompts, Texts(model, needs, self.text_cache, prompts), model.latent_shape())


def read_prompts(path: str | Path) -> Lines:
    """The non-empty lines of a text file, stripped. DataError if it cannot be read or has none."""
    try:
        prompts = Lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Prompts reads a text file with one prompt per line.") from None
    if not prompts:
        raise DataError(f"{path}: no prompts in it; write one per line")
    return prompts


@dataclass(frozen=True)
class _PromptSource:
    prompts: Lines
    texts: Texts
    shape: tuple[int, int, int, int]

    def batch(self, size: int, rng: Rng) -> Batch:
        chosen = tuple(self.prompts[i] for i in draw_indices(len(self.prompts), size, rng))
        cond, uncond = self.texts(chosen, rng.device)
        return Batch(cond=cond, uncond=uncond, latent_shape=self.shape, prompts=chosen)
