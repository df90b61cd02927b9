"""What is told of the frames of a stream besides its prompt: keys, a beat, the place of a camera.

People hold keys and hear sound for frames that are seen; a network reads numbers for latent frames. A latent frame is told the
mean of the frames that it is decoded to: of four frames with `left` held in three, 0.75.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.attention import Facing
from fewstep.compress import FrameInput
from fewstep.streaming.blocks import keep_of


def of_latents(numbers_BNK: Tensor, ends: Sequence[int]) -> Tensor:
    """The numbers of latent frames, `[B, F, K]`, from those of the frames that are seen, `[B, N, K]`.

    `ends[i]` is how many frames `i` latent frames are decoded to (`VideoModel.clip_frames`), from `ends[0]`, the number of
    the first frame. ValueError where the numbers end before the clip.
    """
    if numbers_BNK.ndim != 3 or numbers_BNK.shape[1] < ends[-1] - ends[0]:
        raise ValueError(
            f"{ends[-1] - ends[0]} frames need as many numbers, [B, N, K], one row for each frame; got {list(numbers_BNK.shape)}"
        )
    parts = [numbers_BNK[:, a - ends[0] : b - ends[0]].mean(1) for a, b in zip(ends, ends[1:])]
    return torch.stack(parts, 1)


@dataclass(frozen=True, eq=False)
class Control:
    """Numbers that are told of the frames of a stream from a chunk on."""

    name: str
    numbers_BNK: Tensor
    """Those of the first N frames; the last row stays for all later ones."""
    chunk: int
    frame: int
    """Number of the first frame of this chunk in the stream."""


def inputs_of(card: Any) -> Mapping[str, int]:
    """How many numbers a model of that card reads of every frame, by their name; `pose` is that of a memory that chooses by it."""
    found = {each.name: each.width for each in card.transforms if isinstance(each, FrameInput)}
    stream = card.contract.stream
    return found | ({"pose": 6} if stream is not None and isinstance(keep_of(stream), Facing) else {})


def numbers_for(card: Any, name: str, numbers: Any, clips: int) -> Tensor:
    """Numbers of one frame `[K]`, of frames `[N, K]`, or of those of each clip `[B, N, K]`, as `[B, N, K]`. ValueError for what
    the model does not read."""
    reads, found = inputs_of(card), torch.as_tensor(numbers, dtype=torch.float32)
    if name not in reads:
        raise ValueError(
            f"{card.name!r} does not read {name!r}; what it reads of every frame: {', '.join(reads) or 'nothing'}"
        )
    found = found[None] if found.ndim == 1 else found
    found = found.expand(clips, -1, -1) if found.ndim == 2 else found
    if found.ndim != 3 or found.shape != (clips, found.shape[1], reads[name]) or not found.shape[1]:
        raise ValueError(
            f"{name}: give {reads[name]} numbers for one frame, a row of them for each frame, or such rows for each of {clips} "
            f"clips; got {list(torch.as_tensor(numbers).shape)}"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"{name}: the numbers must be finite")
    return found


def told(controls: Sequence[Control], ends: Sequence[int]) -> dict[str, Tensor]:
    """What is told of the latent frames of a chunk, by name, `[B, F, K]` each; of two controls of one frame the later one counts.

    `ends` as in `of_latents`. A name of which nothing has been told by then is not there.
    """
    latest = dict[str, Tensor]()
    for control in controls:
        if control.frame > ends[0]:
            continue
        last = control.numbers_BNK.shape[1] - 1
        rows = (torch.arange(ends[0], ends[-1]) - control.frame).clamp_max(last)
        latest[control.name] = control.numbers_BNK[:, rows]
    return {name: of_latents(numbers, ends) for name, numbers in latest.items()}


def lasting(controls: Sequence[Control], chunk: int) -> tuple[Control, ...]:
    """Those that chunk `chunk` or a later one is told of, in order."""
    latest = {control.name: control for control in controls if control.chunk <= chunk}
    return tuple(c for c in controls if c.chunk > chunk or latest[c.name] is c)
