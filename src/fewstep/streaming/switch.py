"""Ways to change the prompt of a stream, from the next chunk on.

keep     the memory stays: smooth, and slow to follow, because the past was made for the prompt before
recache  the memory is made anew from the last latents, with the new prompt (LongLive, 2509.22622): one call per chunk
clear    only the sink stays in memory: a hard cut
lerp     the memory stays, and the prompt's states go from the old to the new ones over some chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fewstep.core import Cond

Switch = Literal["keep", "recache", "clear", "lerp"]
Mix = tuple[tuple[tuple[str, ...], float], ...]
"""Prompts, one for each clip, with their weight; the weights sum to 1."""


@dataclass(frozen=True)
class Fade:
    """A change of prompts over several chunks."""

    before: Mix
    """What it began from: one prompt, or a mix where it began during another change."""
    since: int
    """First chunk of the change."""
    over: int
    """Number of chunks until the new prompts are alone; the last of them has nothing else."""

    def at(self, chunk: int, prompts: tuple[str, ...]) -> Mix:
        """What chunk `chunk` is made of, on the way to `prompts`."""
        new = min((chunk - self.since + 1) / self.over, 1.0)
        if new == 1.0:
            return ((prompts, 1.0),)
        if new <= 0.0:
            return self.before
        return (*((old, weight * (1 - new)) for old, weight in self.before), (prompts, new))


def require_switch(how: str, over: int) -> None:
    """ValueError for another way than those above, and for a change over no chunk."""
    if how not in get_args(Switch):
        raise ValueError(f"how must be one of {', '.join(get_args(Switch))}, not {how!r}")
    if over < 1:
        raise ValueError(f"a change of prompts takes at least 1 chunk, not {over}")


def mixed(conds: Sequence[Cond], weights: Sequence[float]) -> Cond:
    """Conditions between others: the weighted sum of their states, in which padded tokens count as zeros. A token is read where
    one of them has it. ValueError for states of different shapes."""
    if len(conds) == 1:
        return conds[0]
    shapes = {tuple(cond.text.shape) for cond in conds}
    if len(shapes) > 1:
        raise ValueError(
            f"prompts can be mixed if their states have one shape, not {sorted(shapes)}; change them at once"
        )
    first = conds[0]
    text = sum(w * cond.text * cond.mask[..., None] for cond, w in zip(conds, weights, strict=True))
    mask = torch.stack([cond.mask for cond in conds]).any(0)
    extra = {
        name: sum(w * cond.extra[name] for cond, w in zip(conds, weights, strict=True)).to(value)  # type: ignore[union-attr]
        if value.is_floating_point()
        else value
        for name, value in first.extra.items()
    }
    return Cond(text.to(first.text), mask, extra, first.framewise)  # type: ignore[union-attr]
