"""Videos that are given to a model: to be changed, or to be made sharp by a student that was trained for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.core.pixels import covering
from fewstep.streaming import Video, fitting
from fewstep.streaming.video import require_noise

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


@torch.no_grad()
def cover_latents(model: VideoModel, frames: Tensor) -> Tensor:
    """Latents `[B, C, F, h, w]` of clips `[B, 3, F, H, W]` of any size, scaled to cover the model's and cropped at the centre.

    Training and sampling scale alike.
    """
    return model.codec.encode(covering(frames, (model.card.height, model.card.width)))


def video_for(model: VideoModel, latents: Tensor | None) -> Video | None:
    """A video of these latents `[B, C, F, h, w]`, for a model that begins with one; None for others. ValueError where it begins
    with one, and there is none."""
    grid, stream = model.card.contract.grid, model.card.contract.stream
    if latents is None:
        require_noise(grid)
    if latents is None or grid.video_noise is None:
        return None
    chunks = (latents,) if stream is None else latents.split(stream.lengths(latents.shape[2]), 2)
    return Video(lambda index: chunks[index])


@torch.no_grad()
def video_of(model: VideoModel, frames: Tensor, strength: float = 1.0) -> Video:
    """A video for `model(prompts, video=...)` from clips `[B, 3, F, H, W]` in [-1, 1] of any size (`cover_latents`).

    One clip for all prompts, or one for each.

    >>> clips = student([""], video=video_of(student, low))          # doctest: +SKIP

    ValueError for what are no such clips, and for a number of frames that a stream cannot make.
    """
    if frames.ndim != 5 or frames.shape[1] != 3 or not frames.is_floating_point() or bool((frames.abs() > 1).any()):
        raise ValueError(
            f"clips are floating-point numbers [B, 3, F, H, W] in [-1, 1]; got {frames.dtype} {list(frames.shape)}"
        )
    model.bring("codec")
    where = next(model.codec.parameters()).device
    latents, stream = cover_latents(model, frames.to(where)).to(model.device), model.card.contract.stream
    if stream is None:
        return Video(lambda _: latents, strength)
    lengths = fitting(stream, frames.shape[2], lambda count: model.latent_shape(count)[1])
    chunks = latents.split(lengths, 2)
    return Video(lambda index: chunks[index], strength)
