"""The order of an iteration: whoever learns the student's clips, in turns, then the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fewstep.methods.base import Sync, Update


def in_turns(
    step: int, followers: Iterable[Update], student: Update, *, warmup: int, align: float = 0.0
) -> Iterator[Update | Sync]:
    """The events of iteration `step`: the updates of the `followers` (critic, discriminator), then that of the student.

    The first `warmup` iterations have no update of the student: its followers begin as the teacher or at chance, and their
    gradients mean nothing before they know its clips. After each update of the student its critic takes the share `align` of its
    weights (SenseFlow, 2506.00523).
    """
    yield from followers
    if step >= warmup:
        yield student
        if align > 0:
            yield Sync("critic", "student", 1 - align)
