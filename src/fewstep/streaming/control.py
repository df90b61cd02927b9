"""What is told of the frames of a stream besides its prompt: keys, a beat, the place of a camera.

People hold keys and hear sound for frames that are seen; a network reads numbers for latent frames. A latent frame is told the
mean of the frames that it is decoded to: of four frames with `left` held in three, 0.75.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.attention import Facing
from fewstep.compress import FrameInput
from fewstep.streaming.blocks import keep_of


def of_latents(
    numbers_BNK: Tensor, ends: Sequence[int], back: int = 0, ahead: int = 0, *, first: int | None = None
) -> Tensor:
    """The numbers of latent frames, `[B, F, (back + 1 + ahead) K]`, from those of the frames that are seen, `[B, N, K]`.

    `ends[i]` is how many frames `i` latent frames are decoded to (`VideoModel.clip_frames`), from `ends[0]`, the number of
    the first frame that is told of; `first` is that of the first row (None: the same). Besides the mean of its own frames a
    latent frame is told that of the frames 1 to `back` earlier and 1 to `ahead` later, the earliest first; beyond both ends the
    outermost row stays. ValueError where the numbers end before the clip.
    """
    first = ends[0] if first is None else first
    if numbers_BNK.ndim != 3 or numbers_BNK.shape[1] < ends[-1] - first:
        raise ValueError(
            f"{ends[-1] - ends[0]} frames need as many numbers, [B, N, K], one row for each frame; got {list(numbers_BNK.shape)}"
        )
    last, parts = numbers_BNK.shape[1] - 1, list[Tensor]()
    for a, b in zip(ends, ends[1:]):
        rows = torch.arange(a, b) - first + torch.arange(-back, ahead + 1)[:, None]  # [offset, frame]
        parts.append(numbers_BNK[:, rows.clamp(0, last)].mean(2).flatten(1))
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
    fed: bool = False
    """Whether more rows follow: then the stream waits for them, and the last row does not stay."""

    def lacks(self, end: int) -> bool:
        """Whether rows are still to come for frames before number `end`."""
        return self.fed and self.frame + self.numbers_BNK.shape[1] < end


def inputs_of(card: Any) -> Mapping[str, FrameInput]:
    """What a model of that card reads of every frame, by name; `pose` is that of a memory that chooses by it."""
    found = {each.name: each for each in card.transforms if isinstance(each, FrameInput)}
    stream = card.contract.stream
    facing = stream is not None and isinstance(keep_of(stream), Facing)
    return found | ({"pose": FrameInput(name="pose", width=6)} if facing else {})


def keys_of(card: Any) -> tuple[str, ...]:
    """Names of the keys that a model of that card reads, in the order of their numbers; none: it reads no keys."""
    found = inputs_of(card).get("keys")
    return () if found is None else found.words


def row_of(held: Collection[str], keys: Sequence[str]) -> list[float]:
    """The numbers of a frame during which these of the model's `keys` are held. ValueError for another one."""
    if unknown := sorted(set(held) - set(keys)):
        raise ValueError(f"unknown key {', '.join(unknown)}; the keys are {', '.join(keys)}")
    return [float(key in held) for key in keys]


def held_last(card: Any, told: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Keys that the first clip was told of in the last latent frame of a chunk: those held for at least half of its frames."""
    if "keys" not in told or not (keys := keys_of(card)):
        return ()
    start = inputs_of(card)["keys"].back * len(keys)
    own = told["keys"][0, -1, start : start + len(keys)].tolist()
    return tuple(key for key, share in zip(keys, own, strict=True) if share >= 0.5)


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
    if found.ndim != 3 or found.shape != (clips, found.shape[1], reads[name].width) or not found.shape[1]:
        raise ValueError(
            f"{name}: give {reads[name].width} numbers for one frame, a row of them for each frame, or such rows for each of "
            f"{clips} clips; got {list(torch.as_tensor(numbers).shape)}"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"{name}: the numbers must be finite")
    return found


def told(controls: Sequence[Control], ends: Sequence[int], inputs: Mapping[str, FrameInput]) -> dict[str, Tensor]:
    """What is told of the latent frames of a chunk, by name, `[B, F, numbers]` each: of every frame by the last control that
    begins with it or earlier, in the order of `controls`.

    `ends` as in `of_latents`. A name of which nothing has been told by then is not there.
    """
    made = dict[str, Tensor]()
    for name, each in inputs.items():
        frames, rows = torch.arange(ends[0] - each.back, ends[-1] + each.ahead), None
        for control in (one for one in controls if one.name == name):
            if rows is None and control.frame > ends[0]:
                break
            held = control.numbers_BNK[:, (frames - control.frame).clamp(0, control.numbers_BNK.shape[1] - 1)]
            begun = (frames >= control.frame)[None, :, None].to(held.device)
            rows = held if rows is None else torch.where(begun, held, rows)
        if rows is not None:
            made[name] = of_latents(rows, ends, each.back, each.ahead, first=ends[0] - each.back)
    return made


def lasting(controls: Sequence[Control], frame: int) -> tuple[Control, ...]:
    """Those that tell of frame `frame` or later ones, in order."""
    latest = {control.name: control for control in controls if control.frame <= frame}
    return tuple(c for c in controls if c.frame > frame or latest[c.name] is c)


def fed(controls: Sequence[Control], new: Control) -> tuple[Control, ...]:
    """`controls` with more rows: those of `new` follow the ones that were fed before under its name, if there are any."""
    before = next((c for c in controls if c.fed and c.name == new.name), None)
    if before is not None:
        rows = torch.cat([before.numbers_BNK, new.numbers_BNK], 1)
        new = replace(before, numbers_BNK=rows, fed=new.fed)
    others = (c for c in controls if c is not before)
    return tuple(sorted([*others, new], key=lambda control: control.chunk))


def require_moment(what: str, at: float | None, chunk: int | None) -> None:
    """ValueError for a time and a chunk, and for one before the stream."""
    if at is not None and chunk is not None:
        raise ValueError(f"give the time or the chunk from which {what}, not both; got {at} and {chunk}")
    if not (0 <= (at or 0) < math.inf) or (chunk or 0) < 0:
        raise ValueError(f"{what} from second 0 or chunk 0 on, got {chunk if at is None else at}")
