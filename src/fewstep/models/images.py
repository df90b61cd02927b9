"""Images as conditions, for image-to-video models (`VideoModel` with a part `image`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from fewstep.core import Cond
from fewstep.models.autoencoder import FrameAutoencoder

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel

Images = Tensor | Mapping[str, Tensor]
"""Pictures `[3, H, W]` or `[B, 3, H, W]` in [-1, 1], as large as the clips; or the conditions that were made of them. One for
all clips, or one for each."""


class ImageEncoder(Protocol):
    """What a part `image` is."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its conditions in `Cond.extra`."""
        ...

    @property
    def needs_last(self) -> bool:
        """Whether a clip needs its last image as well as its first."""
        ...

    def encode(
        self, image: Tensor, codec: FrameAutoencoder, num_frames: int, last_image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Conditions of images `[B, 3, H, W]`. ValueError for a last image of no use, or a missing one."""
        ...

    def blank(self, batch: int, codec: FrameAutoencoder, size: tuple[int, int, int]) -> dict[str, Tensor]:
        """What `encode` would make of clips of `size` `(F, H, W)`, all zero."""
        ...


def image_conditions(
    model: VideoModel, batch: int, image: Images | None, last_image: Tensor | None, num_frames: int
) -> dict[str, Tensor]:
    """What `batch` clips shall begin (and end) with, by name in `Cond.extra`; empty where the model reads text alone.

    ValueError where a picture is missing, or of no use.
    """
    name = model.card.name
    if "image" not in model.parts:
        if image is not None or last_image is not None:
            raise ValueError(f"{name!r} is a text-to-video model; leave out image (--image)")
        return {}
    if isinstance(image, Mapping):
        if last_image is not None:
            raise ValueError("conditions of images contain the last one already; leave out last_image")
        made: Mapping[str, Tensor] = image
    else:
        first, last = _picture(model, "image", image), None
        if last_image is not None:
            last = _picture(model, "last_image", last_image)
            count = max(len(first), len(last))
            if not {len(first), len(last)} <= {1, count}:
                raise ValueError(
                    f"a clip between two images has one of each; got {len(first)} first, {len(last)} last ones"
                )
            first, last = first.expand(count, -1, -1, -1), last.expand(count, -1, -1, -1)
        made = _part(model).encode(first, model.codec, num_frames, last)
    if count := next((len(x) for x in made.values() if len(x) not in (1, batch)), 0):
        raise ValueError(f"{count} images for {batch} clips: give one for all, or one for each")
    return {key: x.to(model.device).expand(batch, *x.shape[1:]) for key, x in made.items()}


def blank_images(model: VideoModel, batch: int, num_frames: int) -> dict[str, Tensor]:
    """Conditions of images that say nothing; empty where the model reads text alone."""
    size = (num_frames, model.card.height, model.card.width)
    return _part(model).blank(batch, model.codec, size) if "image" in model.parts else {}


def first_latents(model: VideoModel, clips: int, image: Tensor) -> Tensor:
    """Latents `[B, C, 1, h, w]` of a picture `[3, H, W]`, or of one for each clip, for streams whose first chunk is one latent
    frame: they begin with it, and no part `image` is needed.

    ValueError for a stream with a longer first chunk, and for a codec that makes no single frames.
    """
    name, stream = model.card.name, model.card.contract.stream
    if "image" in model.parts:
        raise ValueError(
            f"{name!r} reads its image in every chunk, which streams cannot do yet; take a text-to-video model"
        )
    if stream is not None and stream.length(0) != 1:
        raise ValueError(
            f"{name!r} makes its first chunk of {stream.length(0)} latent frames at once, and an image is one: train a student "
            f"whose stream has chunks [1, {stream.length(1)}], or give latents of whole chunks, Session.begin_with(...)"
        )
    pictures = _picture(model, "image", image, "begins with an image")
    if len(pictures) not in (1, clips):
        raise ValueError(f"{len(pictures)} images for {clips} clips: give one for all, or one for each")
    return image_latents(model, pictures).expand(clips, -1, -1, -1, -1)


@torch.no_grad()
def image_latents(model: VideoModel, pictures: Tensor) -> Tensor:
    """Latents `[B, C, 1, h, w]` of pictures `[B, 3, H, W]`. ValueError for a codec that makes no single frames."""
    model.bring("codec")
    latents = model.codec.encode(pictures[:, :, None]).to(model.device)
    if latents.shape[2] != 1:
        raise ValueError(
            f"the codec of {model.card.name!r} makes {latents.shape[2]} latent frames of one frame, and an image is one; take a "
            "model with another codec"
        )
    return latents


def images_in(model: VideoModel, cond: Cond) -> Mapping[str, Tensor] | None:
    """What a condition says of pictures, as `VideoModel.latents` takes it; None where the model reads text alone."""
    return {name: cond.extra[name] for name in image_names(model)} or None


def image_names(model: VideoModel) -> tuple[str, ...]:
    """What conditions of pictures are called; empty where the model reads text alone."""
    return _part(model).names if "image" in model.parts else ()


def _part(model: VideoModel) -> ImageEncoder:
    return cast(ImageEncoder, model.part("image"))


def _picture(model: VideoModel, name: str, picture: Tensor | None, what: str = "is an image-to-video model") -> Tensor:
    """As `[B, 3, H, W]` where the codec is."""
    size = (3, model.card.height, model.card.width)
    if picture is None or picture.shape[-3:] != size or picture.ndim not in (3, 4):
        got, flag = "none" if picture is None else str(list(picture.shape)), "--" + name.replace("_", "-")
        raise ValueError(f"{model.card.name!r} {what}: give {name} ({flag}), {list(size)}; got {got}")
    if not (picture.is_floating_point() and bool((picture.abs() <= 1).all())):
        raise ValueError(
            f"{name} is a picture of floating-point numbers in [-1, 1]: x / 127.5 - 1 of 8 bits, 2 x - 1 of [0, 1]"
        )
    return (picture if picture.ndim == 4 else picture[None]).to(next(model.codec.parameters()).device)
