"""First (and last) frames for image-to-video models, listed in files or stored with the clips."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fewstep.data.base import DataError
from fewstep.data.layouts import table_cell, table_rows
from fewstep.data.remembered import Remembered
from fewstep.data.video import read_image
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.images import ImageEncoder, image_conditions, image_names


class Pictured(Sequence[str]):
    """The captions of a .csv or .jsonl file, each with the picture in its column `image`, and in `last_image` if there is one.

    Picture names are relative to the file's folder. DataError for a row without a caption, or whose picture does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        table = Path(path)
        self.rows = tuple(_row(table.parent, row, where) for where, row in table_rows(table))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return [row[0] for row in self.rows[index]] if isinstance(index, slice) else self.rows[index][0]

    def digest(self) -> str:
        """Digest of the images, from the content of their files."""
        hashed = hashlib.sha256()
        for _, paths in self.rows:
            for name, path in paths.items():
                with path.open("rb") as file:
                    hashed.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return hashed.hexdigest()[:12]

    def pictures(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """The pictures of a row, `image` and `last_image` `[3, H, W]`, scaled to cover `size` and cropped."""
        return {name: read_image(path, size) for name, path in self.rows[index][1].items()}


def _row(folder: Path, row: Mapping[str, Any], where: str) -> tuple[str, dict[str, Path]]:
    caption = table_cell(row, ("caption",), where)
    names = {"image": table_cell(row, ("image",), where), "last_image": row.get("last_image")}
    paths = {key: folder / name for key, name in names.items() if isinstance(name, str) and name}
    if not isinstance(caption, str) or not caption.strip() or "image" not in paths:
        raise DataError(f"{where} needs a caption and an image, and has {caption!r} and {names['image']!r}")
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{where} names {path}, and there is no such file; correct the name")
    return caption.strip(), paths


class PictureConditions:
    """Conditions from the pictures of these prompts. Each row is encoded alone when it is first drawn (see `Remembered`)."""

    def __init__(self, model: VideoModel, prompts: Pictured, num_frames: int) -> None:
        self.model, self.prompts, self.num_frames = model, prompts, num_frames
        self.rows = Remembered(self._encode, lambda made: made.values())

    def __call__(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Conditions of these rows, by name in `Cond.extra`, in main memory."""
        made = [self.rows(index) for index in indices]
        return {name: torch.cat([row[name] for row in made]) for name in image_names(self.model)}

    @torch.no_grad()
    def _encode(self, index: int) -> dict[str, Tensor]:
        pictures = self.prompts.pictures(index, (self.model.card.height, self.model.card.width))
        made = image_conditions(self.model, 1, pictures["image"], pictures.get("last_image"), self.num_frames)
        return {name: x.to("cpu") for name, x in made.items()}


def encode_ends(image: ImageEncoder, codec: FrameAutoencoder, frames: Tensor) -> dict[str, Tensor]:
    """Conditions from the clips' own first frames (and last, if the encoder needs them); `frames` `[B, 3, F, H, W]`."""
    last = frames[:, :, -1] if image.needs_last else None
    return image.encode(frames[:, :, 0], codec, frames.shape[2], last)


def require_pictures(prompts: Sequence[str], card: Card, path: str | Path) -> None:
    """DataError if an image-to-video model gets prompts without images, or another model gets prompts with images."""
    if "image" in card.parts and not isinstance(prompts, Pictured):
        raise DataError(
            f"{path} has no pictures, and {card.name!r} is an image-to-video model; give a .csv with the columns caption "
            "and image"
        )
    if "image" not in card.parts and isinstance(prompts, Pictured):
        raise DataError(
            f"{path} has pictures, and {card.name!r} is a text-to-video model; give a text file with one prompt per line"
        )


def require_text_alone(card: Card, name: str) -> None:
    """DataError for an image-to-video model: the data called `name` have no images."""
    if "image" in card.parts:
        raise DataError(
            f"{card.name!r} is an image-to-video model, and {name} has no images; use Videos, Latents (fewstep prepare), "
            "StoredPairs (fewstep pairs), or Prompts with a .csv file"
        )


def require_stored(there: Mapping[str, Any], card: Card, here: str, folder: str) -> None:
    """DataError if an image-to-video model gets a folder without images, or with those of another model.

    `here` is the fingerprint of its part `image`, if it is known.
    """
    if "image" not in card.parts:
        return
    if "image" not in there:
        raise DataError(
            f"{folder} has no images, and {card.name!r} is an image-to-video model; make the folder again with this model"
        )
    if here and there["image"] != here:
        raise DataError(
            f"{folder} holds images encoded by {there['image']}, and the image encoder of {card.name!r} is {here}; make the "
            "folder again with this model"
        )
