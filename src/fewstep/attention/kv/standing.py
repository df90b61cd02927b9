"""Where remembered frames stand, as rotary embedding is told: policies of positions.

Attention depends on differences of positions only. So without a sink all policies are the same model; with one, `window` and
`sink` move it closer than it is, which is another model and needs training or a test of its own.
"""

from __future__ import annotations

from torch import Tensor, where

from fewstep.diffusion import Standing

EMPTY = -1
"""The position of a slot that holds no frame."""


def stand(
    policy: Standing, positions: Tensor, start: Tensor, sink: int, chunk: int, longest: int | None
) -> tuple[Tensor, Tensor]:
    """Positions of the remembered frames `positions` `[S]` or `[B, S]`, and of the next frame `start`, `[]` or `[B]`.

    `absolute`: their own. `window`: counted from the oldest remembered frame, without gaps (LongLive's re-indexing). `sink`:
    their own, but the first `sink` frames stand just before the oldest of the others (Rolling Forcing, 2509.25161). `rebased`:
    their own, until the next `chunk` frames would pass the end of the table of `longest` positions; then all move down until the
    oldest is at 0. Frames that stay for ever do not let it move.
    """
    there = positions != EMPTY
    if policy == "window" and not positions.shape[-1]:
        return positions, 0 * start
    if not positions.shape[-1] or policy == "absolute":
        return positions, start
    if policy == "window":
        earlier = (positions[..., None, :] < positions[..., :, None]) & there[..., None, :]
        return where(there, earlier.sum(-1), positions), there.sum(-1)
    if policy == "sink":
        pinned = there & (positions < sink)
        oldest = where(there & ~pinned, positions, start[..., None]).amin(-1, keepdim=True)
        return where(pinned, oldest - pinned.sum(-1, keepdim=True) + positions, positions), start
    oldest = where(there, positions, start[..., None]).amin(-1)
    down = oldest * 0 if longest is None else where(start + chunk > longest, oldest, 0)
    return where(there, positions - down[..., None], positions), start - down
