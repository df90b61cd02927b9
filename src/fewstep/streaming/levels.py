"""A memory for each step (Live Avatar, 2512.04677): step i of a chunk reads what step i of earlier chunks has made.

Its keys and values lie one behind the other in one memory: those of all blocks in the first step, then in the second, and so on.
A process that makes one step alone (`streaming.pipelined`) has its part and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from fewstep.attention import KVCache
from fewstep.core import KV, KVView

T = TypeVar("T")


def view_of(view: KVView, step: int, steps: int) -> KVView:
    """What calls of one step read."""
    states = None if view.states is None else _part(view.states, step, steps)
    return replace(view, layers=_part(view.layers, step, steps), states=states)


def memory_of(memory: KVCache, step: int, steps: int) -> KVCache:
    """What one step has left. ValueError for a policy that looks at keys, which would choose other frames for a part of them."""
    if memory.notes or memory.poses_BfP is not None:
        raise ValueError(
            f"{type(memory.keep).__name__} chooses frames by what all steps have made; let the stream have a window"
        )
    return replace(memory, layers=_part(memory.layers, step, steps), states=_part(memory.states, step, steps))


def joined(steps: Sequence[tuple[KV, ...] | None]) -> tuple[KV, ...] | None:
    """Keys and values of a chunk, from those of its steps; None where one of them skipped blocks."""
    every = list[KV]()
    for kv in steps:
        if kv is None:
            return None
        every += kv
    return tuple(every)


def _part(layers: tuple[T, ...], step: int, steps: int) -> tuple[T, ...]:
    count, rest = divmod(len(layers), steps)
    if rest:
        raise ValueError(
            f"this memory is not one of {steps} steps; let a stream that remembers every step keep its number of steps"
        )
    return layers[step * count : (step + 1) * count]
