"""The process that computes: it holds the models, and makes one network call at a time for whoever needs it most; with
`Served.batch`, for others together with it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch

from fewstep.core.finite import NonFiniteError
from fewstep.models import VideoModel
from fewstep.models.runtime import Runtime
from fewstep.serve.orders import Beat, Close, Declined, Down, Facts, Failed, Make, News, Open, Order, Up
from fewstep.serve.tasks import Clip, Stream, Task, chunk_frames, release
from fewstep.streaming import LiveSession, Session, Switch
from fewstep.streaming.control import keys_of
from fewstep.streaming.together import Together

IDLE = 0.02
"""Seconds between two looks at the clock while every viewer has enough frames."""
BEAT = 1.0
"""Seconds between two signs of life."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a worker serves."""

    models: tuple[tuple[str, str], ...]
    """Names by which clients ask, and folders or built-ins."""
    runtime: Runtime = Runtime()
    threads: int | None = None
    """Threads of a CPU; None: torch's own number."""
    trust: bool = False
    folder: Path = Path()
    """Where snapshots are written."""
    batch: int = 1
    """Streams at most whose network calls are made as one (`streaming.together`); 1: every call is made alone."""

    def load(self) -> dict[str, VideoModel]:
        return {
            name: VideoModel.from_pretrained(source, runtime=self.runtime, trust=self.trust)
            for name, source in self.models
        }


def run(pipe: Connection, served: Served) -> None:
    """The process: load, warm up, then follow orders until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when it ends
    if served.threads is not None:
        torch.set_num_threads(served.threads)
    try:
        models = served.load()
        facts = tuple(warm(name, model, served.batch) for name, model in models.items())
    except (ValueError, OSError) as error:
        pipe.send(Down(message=str(error)))
        return
    pipe.send(Up(models=facts))
    try:
        Worker(models, pipe, served.folder, batch=served.batch).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server is gone


class Worker:
    """Tasks, and which of them is next: the one whose viewer runs out of frames first."""

    def __init__(
        self,
        models: Mapping[str, VideoModel],
        pipe: Connection,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        batch: int = 1,
    ) -> None:
        self._models, self._pipe, self._folder, self._clock = models, pipe, folder, clock
        self._together = Together(batch) if batch > 1 else None
        self._tasks: dict[str, Task] = {}
        self._beat = clock()

    def run(self) -> None:
        """Without end. EOFError when the server has closed the pipe."""
        while True:
            if self._clock() - self._beat >= BEAT:
                self._beat = self._clock()
                self._pipe.send(Beat(memory_held()))
            task = self.next()
            patience = 0.0 if task else IDLE if self._tasks else BEAT
            while self._pipe.poll(patience):
                self.follow(self._pipe.recv())
                patience = 0.0
                task = self.next()
            if task is not None:
                self.work(task)

    def next(self) -> str | None:
        """The task whose next call is due first; None if nobody waits for one."""
        return next(iter(self._waiting()), None)

    def _waiting(self) -> list[str]:
        """Tasks whose next call may be made now, those first that are due first."""
        now = self._clock()
        due = {name: when for name, task in self._tasks.items() if (when := task.due(now)) is not None}
        return sorted(due, key=due.__getitem__)

    def follow(self, order: Order) -> None:
        """An order. A task that cannot begin is answered by `Failed`; what one cannot do that is there, by `Declined`."""
        task = self._tasks.get(order.id)
        try:
            match order:
                case Open() | Make():
                    kind: Any = Stream if isinstance(order, Open) else Clip
                    self._tasks[order.id] = kind(
                        order, self._models[order.model], self._folder, self._say, self._clock()
                    )
                case Close():
                    self._end(order.id)
                case _ if task is not None:
                    self._tell(order, task)
        except Exception as error:
            self._failed(order.id, error)

    def _tell(self, order: Order, task: Task) -> None:
        try:
            task.hear(order, self._clock())
        except ValueError as error:  # a way to change prompts that this student has not
            self._say(Declined(id=order.id, message=str(error), token=getattr(order, "token", "")))
        except OSError:
            log.exception("a snapshot could not be written")
            self._say(Declined(id=order.id, message="the server could not write the file; try again later"))

    def work(self, name: str) -> None:
        """One network call of a task, and together with it those of others."""
        if self._together is None:
            self._worked(name, partial(self._tasks[name].work, self._clock))
            return
        names = [name, *self._company(name)[: self._together.most - 1]]
        lanes = self._together({each: partial(self._tasks[each].work, self._clock) for each in names})
        for each, lane in lanes.items():
            self._tasks[each].shape = lane.shape or self._tasks[each].shape
            self._worked(each, lane.done.result)

    def _company(self, name: str) -> list[str]:
        """Other tasks that wait, too, and whose last call could have been made as one with that of `name`. Nobody is waited for.
        If the next call of one of them turns out to have another shape, it is made alone, after that of `name`."""
        mine, shape = self._tasks, self._tasks[name].shape
        return [
            o for o in self._waiting() if o != name and shape is not None and mine[o].joins and mine[o].shape == shape
        ]

    def _worked(self, name: str, more: Callable[[], bool]) -> None:
        """What comes of a call: whether more follow, or an error."""
        try:
            if not more():
                self._end(name)
        except Exception as error:
            self._failed(name, error)

    def _say(self, news: News) -> None:
        self._pipe.send(news)

    def _end(self, name: str) -> None:
        if self._together is not None:
            self._together.forget()
        if (task := self._tasks.pop(name, None)) is not None:
            task.close()

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):
            raise error
        try:
            self._end(name)
        except Exception:
            log.exception("closing a task that failed")
        self._pipe.send(_told(name, error))


def _told(name: str, error: Exception) -> Failed:
    """An error as clients may see it: without paths of this machine, unless it is about what they asked for."""
    match error:
        case NonFiniteError():
            message = "the model made numbers that are no pictures (not finite); use another seed or prompt"
            return Failed(id=name, code="not_finite", message=message)
        case torch.OutOfMemoryError():
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return Failed(
                id=name, code="out_of_memory", message="the device has no memory left; try again", retryable=True
            )
        case ValueError():
            return Failed(id=name, code="invalid_request", message=str(error))
        case _:
            log.error("a task failed", exc_info=error)
            return Failed(
                id=name, code="internal_error", message="the worker failed; the server's log says why", retryable=True
            )


def warm(name: str, model: VideoModel, batch: int = 1) -> Facts:
    """Make a little of everything, so that nothing is compiled or allocated for the first client; and measure it. ValueError for
    a `batch` of streams whose calls cannot be made as one."""
    card = model.card
    facts = Facts(
        name=name, role=card.role, fps=card.fps, height=card.height, width=card.width, frames=card.num_frames,
        steps=steps_of(model), guided=card.role != "student", guidance=card.contract.guidance.scale,
        takes_image="image" in model.parts,
        licence=card.provenance.get("licence", ""),
    )  # fmt: skip
    if card.contract.stream is None:
        image = torch.zeros(3, card.height, card.width) if facts.takes_image else None
        *_, last = model.sampling([""], image=image, num_inference_steps=facts.steps[-1] if facts.steps else 2)
        with torch.inference_mode():
            model.decode(last.x)
        return facts
    with model.stream([""]) as live:
        release(live, model)
        chunks = full_chunks(model) + 2
        took = [chunk.took for chunk in live.frames(chunks)][-2:]
    seconds = min(t.denoise + t.commit + t.decode for t in took) / 1000
    return replace(
        facts, chunk_frames=chunk_frames(model), chunk_seconds=seconds, joined_seconds=joined_seconds(name, model, batch),
        keys=keys_of(card), switches=switches_of(model),
    )  # fmt: skip


def joined_seconds(name: str, model: VideoModel, batch: int) -> tuple[float, ...]:
    """Time in which 2, 3, ... `batch` streams make a chunk each, with full memories and one call for all."""
    if batch < 2:
        return ()
    together, found = Together(batch), list[float]()
    with contextlib.ExitStack() as ended:
        lives = {str(seed): ended.enter_context(model.stream([""], seed=seed)) for seed in range(batch)}
        for live in lives.values():
            release(live, model)
        for chunk in range(full_chunks(model)):
            made_together(together, lives, chunk + 1)
        while len(lives) > 1:
            times = [made_together(together, lives, lives["0"].chunks + 1) for _ in range(2)]
            found.insert(0, min(times))
            lives.popitem()
    if found[-1] > batch * found[0] / 2:
        log.warning(
            "%s: a call for %d streams takes no less time than calls for 2 of them; try a smaller --batch", name, batch
        )
    return tuple(max(found[: count + 1]) for count in range(len(found)))


def made_together(together: Together, lives: Mapping[str, LiveSession], chunks: int) -> float:
    """Seconds until each of several streams of one age has shown so many chunks. ValueError where no call of them is joined."""
    start, joined = time.perf_counter(), False
    while any(live.chunks < chunks for live in lives.values()):
        lanes = together({name: live.work for name, live in lives.items()}).values()
        for lane in lanes:
            lane.done.result()
        shape, *others = {lane.shape for lane in lanes}
        joined = joined or (shape is not None and not others)
    if not joined:
        raise ValueError(
            "--batch: network calls of two streams of this model cannot be made as one, even of the same age; leave --batch out"
        )
    return time.perf_counter() - start


def memory_held() -> int:
    """Bytes of this process: of its GPU, else of the machine; 0 where the system does not say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    with contextlib.suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def full_chunks(model: VideoModel) -> int:
    """Chunks after which the memory of a stream is full, so that each further one takes as long."""
    stream = model.card.contract.stream
    assert stream is not None
    return -(-stream.window // max(stream.chunks)) if stream.window else 2


def switches_of(model: VideoModel) -> tuple[Switch, ...]:
    """Ways to change the prompt of a stream of this model."""
    session, found = Session(model, [""]), list[Switch]()
    for how in get_args(Switch):
        with contextlib.suppress(ValueError):
            session.require(how)
            found.append(how)
    return tuple(found)


def steps_of(model: VideoModel) -> tuple[int, ...]:
    """Step counts that a model was trained for, its own first; empty: any."""
    contract = model.card.contract
    others = (count for count in reversed(contract.grid.counts) if count != contract.steps)
    return (contract.steps, *others) if model.card.role == "student" else ()
