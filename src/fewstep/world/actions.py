"""The world that is steered: keys move the object, a beat sets its pace, and a camera moves the view.

What is told of a frame says what happens between the frame before it and this one, in both the renderer and the checker; so
what is told of the first frame of a clip is not seen. A camera that moves to the right shows everything further to the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.world.checker import wrap
from fewstep.world.grammar import DIRECTIONS, Scene
from fewstep.world.renderer import HEADING

KEYS = ("left", "right", "up", "down")
"""Names of the keys, in the order of their numbers. No key: all numbers are 0, and the object stands still."""
PACE = 2.0
"""Pixels per frame while a key is held, and largest of a camera."""
BEAT = (0.5, 2.5)
"""Pixels per frame at a beat of 0 and of 1."""
TOLERANCE = PACE / 2
"""Largest distance, in pixels, of a displacement from the one that was asked for: half the way from no key to a key."""
_HEADING = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # rows grow downwards, so up is negative y


def headings(scenes: Sequence[Scene], keys_BFK: Tensor | None, frames: int) -> Tensor:
    """Where objects head in each frame, `[B, F, 2]` of length 1 or 0: as the keys say, or else the prompts."""
    if keys_BFK is not None:
        return keys_BFK @ _HEADING.to(keys_BFK)
    told = torch.tensor([HEADING[DIRECTIONS.index(scene.direction)] for scene in scenes])
    return told[:, None].expand(-1, frames, -1)


def paces(beat_BF1: Tensor) -> Tensor:
    """Pixels per frame of a beat, `[B, F, 1]`."""
    return BEAT[0] + (BEAT[1] - BEAT[0]) * beat_BF1


def walked(start_B2: Tensor, moves_BF2: Tensor) -> Tensor:
    """Where an object is in every frame, `[B, F, 2]`, whose move from the frame before is `moves`; in the first, at `start`."""
    moves = torch.cat([torch.zeros_like(moves_BF2[:, :1]), moves_BF2[:, 1:]], 1)
    return start_B2[:, None] + moves.cumsum(1)


def random_keys(clips: int, frames: int, generator: torch.Generator, *, held: tuple[int, int] = (2, 8)) -> Tensor:
    """Keys that somebody might hold, `[B, F, 4]`: each for a random number of frames between the two of `held`, then another
    one, or none."""
    keys = torch.zeros(clips, frames, len(KEYS))
    for clip in keys:
        frame, before = 0, -1
        while frame < frames:
            choices = [key for key in range(len(KEYS) + 1) if key != before]  # the last one is no key
            before = choices[int(torch.randint(len(choices), (1,), generator=generator))]
            end = frame + int(torch.randint(held[0], held[1] + 1, (1,), generator=generator))
            if before < len(KEYS):
                clip[frame:end, before] = 1
            frame = end
    return keys


def random_beat(clips: int, frames: int, generator: torch.Generator) -> Tensor:
    """A signal like loudness, `[B, F, 1]` from 0 to 1: a beat every 4 to 8 frames, which fades to half in 1 to 3."""
    every = torch.randint(4, 9, (clips, 1), generator=generator)
    phase = torch.randint(0, 8, (clips, 1), generator=generator)
    fade = 1 + 2 * torch.rand(clips, 1, generator=generator)
    return torch.exp2(-((torch.arange(frames) + phase) % every) / fade)[..., None]


def random_cameras(clips: int, frames: int, generator: torch.Generator) -> Tensor:
    """Poses `[B, F, 6]` (place, direction) of a camera that begins at 0 and moves within the plane, as `attention.Facing` reads
    them; in pixels. It looks straight ahead."""
    moves = PACE * random_keys(clips, frames, generator) @ _HEADING
    place = walked(torch.zeros(clips, 2), moves)
    return torch.cat([place, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(clips, frames, -1)], 2)


def camera_moves(poses_BF6: Tensor) -> Tensor:
    """The move of a camera from the frame before, `[B, F, 2]` in units of `PACE`; 0 in the first frame."""
    place = poses_BF6[..., :2]
    return torch.cat([torch.zeros_like(place[:, :1]), place.diff(dim=1)], 1) / PACE


def obeyed(track_BF2: Tensor, moves_BF2: Tensor) -> Tensor:
    """Whether the object moved from each frame to the next as it was told: bool `[B, F - 1]`.

    `track` is what the checker found (`Readings.track`), and `moves` pixels from the frame before to this one, on the screen. An
    object that is not visible does not obey. Whoever stands still obeys where nothing moves, so a share says little without
    the share of a model that is told nothing.
    """
    moved = wrap(track_BF2.diff(dim=1))
    return (moved - moves_BF2[:, 1:].to(moved)).norm(dim=2) < TOLERANCE  # False where it is not a number


def in_time(track_BF2: Tensor, moves_BF2: Tensor) -> Tensor:
    """How well the pace of each object follows the one that was asked for: the correlation of what it moved from frame to frame
    with what it was told to, over the frames that show it, `[B]`; 0 for an object of one pace, or that is seen in no two moves.

    Whoever moves at the mean pace is often within a pixel of the beat (`obeyed`), and has a correlation of 0 with it.
    """
    moved, told = wrap(track_BF2.diff(dim=1)).norm(dim=2).double(), moves_BF2[:, 1:].norm(dim=2).double()
    seen = ~moved.isnan()
    count = seen.sum(1, keepdim=True).clamp_min(1)
    apart = [torch.where(seen, x - torch.where(seen, x, 0).sum(1, keepdim=True) / count, 0) for x in (moved, told)]
    spread = torch.stack([x.norm(dim=1) for x in apart])
    varies = (spread > 1e-3).all(0)  # pixels: more than rounding
    return torch.where(varies, (apart[0] * apart[1]).sum(1) / spread.prod(0), 0.0)
