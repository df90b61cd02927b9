"""Network calls of several streams, made as one: streams of different age, each at its own step of its own chunk.

    1  each piece of work begins, one after the other, and stops where it asks for a network call
    2  calls of one `shape` are joined along the batch and made once; what the network predicts is split
    3  each piece of work gets its part and goes on, one after the other, until it asks again or ends

Only network calls meet. What surrounds them, samplers and memories, stays each stream's own, so snapshots, cancelling and
steering are as they are without this file. A call is asked for deep inside samplers and guidance, which could not stop there; so
each piece of work has a thread, and only one of these threads runs at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from queue import SimpleQueue
from threading import local
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.core import Call, Cond, KVView
from fewstep.core.call import Constants, every_block
from fewstep.diffusion import Prediction

T = TypeVar("T")
log = logging.getLogger(__name__)


class Network(Protocol):
    """Who makes a call in the end. Equal for two streams of one model."""

    @property
    def by_step(self) -> bool:
        """Whether what it predicts depends on the number of the step, so that calls of one batch are of one step."""
        ...

    @property
    def by_age(self) -> bool:
        """Whether it looks up something by the number of a frame, so that streams of one batch are of one age."""
        ...

    def alone(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call, /) -> Prediction: ...


@dataclass(frozen=True, eq=False)
class Asked:
    """A network call that somebody asks for."""

    network: Network
    x_t: Tensor
    """Latents `[B, C, F, h, w]`."""
    t: Tensor
    """Their time, `[B]` or `[B, F]`."""
    cond: Cond
    call: Call
    answer: Future[Prediction] = field(default_factory=Future)

    @cached_property
    def shape(self) -> Hashable:
        """What calls have in common that can be made as one. None: this one is made alone."""
        call, view = self.call, self.call.kv
        apart = call.causal is not None or call.negative is not None or call.shared is not None
        if view is None or apart or call.runner is not every_block:
            return None
        options = replace(call, kv=None, constants=None, rng=None, step=0, steps=1)
        step = (call.step, call.steps) if self.network.by_step else ()
        age = tuple(view.number.flatten().tolist()) if self.network.by_age else ()
        told = tuple((name, _each(x)) for name, x in sorted(self.cond.extra.items()))
        condition = _each(self.cond.text), _each(self.cond.mask), told, self.cond.framewise
        own = _each(self.x_t), _each(self.t), condition, call.constants is None
        return self.network, options, step, age, own, _past(view)

    def __call__(self) -> Prediction:
        """Make it alone."""
        return self.network.alone(self.x_t, self.t, self.cond, self.call)


def answered(asked: Asked) -> Prediction:
    """The answer to a call: from `Together` in a piece of work that it runs; elsewhere the call is made at once, alone."""
    lane: Lane[Any] | None = getattr(_HERE, "lane", None)
    return asked() if lane is None else lane.stop(asked)


class Lane(Generic[T]):
    """A piece of work that stops at its network calls. It runs while `go_on` waits for it, and at no other time."""

    def __init__(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> None:
        self.asked: Asked | None = None
        """The call at which it has stopped; None: it has ended."""
        self.shape: Hashable = None
        """`Asked.shape` of the last call that it asked for."""
        self._stops = SimpleQueue[Asked | None]()
        self.done: Future[T] = pool.submit(self._whole, work)
        """What came of it."""
        self.go_on()

    def _whole(self, work: Callable[[], T]) -> T:
        _HERE.lane = self
        try:
            return work()
        finally:
            _HERE.lane = None
            self._stops.put(None)

    def stop(self, asked: Asked) -> Prediction:
        """In the thread of the work: hand over a call, and wait for its answer."""
        self._stops.put(asked)
        return asked.answer.result()

    def go_on(self) -> None:
        """Let it run until it asks for the next call, or ends."""
        self.asked = self._stops.get()
        if self.asked is not None:
            self.shape = self.asked.shape


_HERE = local()
"""`lane`: whose work this thread does."""


class Together:
    """Does pieces of work at once, and makes their network calls as one where these have one shape.

    Predictions equal those of calls that are made alone up to rounding: a product of larger matrices adds up in another order.
    They carry no gradient.
    """

    def __init__(self, most: int) -> None:
        """For so many pieces of work at most. ValueError for none."""
        if most < 1:
            raise ValueError(f"a batch has at least 1 stream, not {most}")
        self.most = most
        self._pool = ThreadPoolExecutor(most, "together")
        self.forget()

    def forget(self) -> None:
        """Free what is kept from one call for the next: copies of what its streams read."""
        self._views: tuple[tuple[KVView, ...], KVView] | None = None
        self._constants: tuple[tuple[Constants, ...], Constants] | None = None

    def __call__(self, works: Mapping[str, Callable[[], T]]) -> dict[str, Lane[T]]:
        """Do them all, the first one first: its call is made before others that have another shape. Each lane that comes back
        has ended, with a result or with an error of its own. ValueError for too many."""
        if len(works) > self.most:
            raise ValueError(f"at most {self.most} pieces of work are done at once here, not {len(works)}")
        lanes = dict[str, Lane[T]]()
        try:
            for name, work in works.items():
                lanes[name] = Lane(self._pool, work)
            while waiting := {name: lane.asked for name, lane in lanes.items() if lane.asked is not None}:
                first, *others = waiting
                shape = waiting[first].shape
                self._answer(lanes, [first, *(o for o in others if shape is not None and waiting[o].shape == shape)])
            return lanes
        finally:
            for lane in lanes.values():
                if lane.asked is not None:  # this thread was interrupted
                    lane.asked.answer.cancel()

    def _answer(self, lanes: Mapping[str, Lane[T]], names: Sequence[str]) -> None:
        """Make the calls of some lanes as one, and let each go on. Where that fails, one by one: an error is of one call."""
        asked = {name: each for name in sorted(names) if (each := lanes[name].asked) is not None}
        try:
            made = dict(zip(asked, self._made(list(asked.values())), strict=True))
        except Exception as error:
            if len(names) == 1:
                asked[names[0]].answer.set_exception(error)
                lanes[names[0]].go_on()
                return
            log.warning("a call for %d streams failed (%s); it is made for each alone", len(names), error)
            for name in names:
                self._answer(lanes, [name])
            return
        for name in names:
            asked[name].answer.set_result(made[name])
            lanes[name].go_on()

    @torch.no_grad()
    def _made(self, asked: Sequence[Asked]) -> list[Prediction]:
        """What the network predicts for each of several calls of one shape."""
        if len(asked) == 1:
            return [asked[0]()]
        views = tuple(each.call.kv for each in asked if each.call.kv is not None)
        if self._views is None or not _same(self._views[0], views):
            self._views = None  # freed before the next one is made
            self._views = views, joined(views, [len(each.x_t) for each in asked])
        constants = tuple(each.call.constants for each in asked if each.call.constants is not None)
        if self._constants is None or not _same(self._constants[0], constants):
            self._constants = constants, Constants()
        call = replace(asked[0].call, kv=self._views[1], constants=self._constants[1] if constants else None)
        x_t, t = torch.cat([each.x_t for each in asked]), torch.cat([each.t for each in asked])
        return split(asked[0].network.alone(x_t, t, Cond.cat([each.cond for each in asked]), call), asked)


def joined(views: Sequence[KVView], sizes: Sequence[int]) -> KVView:
    """What streams of so many clips each read of their pasts, as one batch: each at its own positions."""

    def rows(name: str, *shape: int) -> Tensor:
        """A number, or one of each slot, of every clip."""
        return torch.cat([getattr(view, name).expand(size, *shape) for view, size in zip(views, sizes, strict=True)])

    first, slots = views[0], views[0].positions.shape[-1]
    return replace(
        first,
        layers=tuple(
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*(view.layers for view in views), strict=True)
        ),
        positions=rows("positions", slots),
        start=rows("start"),
        readable=None if first.readable is None else rows("readable", slots),
        frame=None if first.frame is None else rows("frame"),
        states=None
        if first.states is None
        else tuple(torch.cat(state) for state in zip(*(view.states or () for view in views), strict=True)),
    )


def split(whole: Prediction, asked: Sequence[Asked]) -> list[Prediction]:
    """What was predicted for each of the calls that were made as one."""
    parts, begin = list[Prediction](), 0
    for each in asked:
        own = slice(begin, begin + len(each.x_t))
        kv = None if whole.kv is None else tuple((k[own], v[own]) for k, v in whole.kv)
        parts.append(Prediction(whole.raw[own], whole.kind, each.x_t, each.t, whole.path, kv))
        begin = own.stop
    return parts


def _each(x: Tensor) -> Hashable:
    """What tensors that are joined along the batch have in common."""
    return x.shape[1:], x.dtype, x.device


def _past(view: KVView) -> Hashable:
    """What pasts of one batch have in common: not where their frames stand."""
    layers = tuple((_each(k), _each(v)) for k, v in view.layers)
    states = None if view.states is None else tuple(map(_each, view.states))
    kind = view.positions.shape[-1], view.readable is None, view.frame is None, view.weight, view.compresses
    return layers, states, kind


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
