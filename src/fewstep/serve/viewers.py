"""All streams of a server: who waits, who is served, and who may come back. No sockets here."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque

from fewstep.serve import protocol
from fewstep.serve.limits import Limits
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import Close, Facts, Open
from fewstep.serve.pace import Gate
from fewstep.serve.snapshots import SnapshotFiles
from fewstep.serve.supervisor import Supervisor
from fewstep.serve.viewer import Viewer


class Refused(ValueError):
    """A stream that cannot be begun, with the code that clients are told."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable


class Viewers:
    """All streams of a server."""

    def __init__(self, supervisor: Supervisor, files: SnapshotFiles, limits: Limits, metrics: Metrics) -> None:
        self._supervisor, self._files, self._limits, self._metrics = supervisor, files, limits, metrics
        self._gate = Gate()
        self._all: dict[str, Viewer] = {}
        self._over: dict[str, Viewer] = {}  # streams that have ended, for viewers who were not there
        self._waiting = deque[Viewer]()
        self._tasks = set[asyncio.Task[None]]()
        self.draining = False
        """Whether the server ends, so that nothing new begins."""

    @property
    def streams(self) -> int:
        return self._gate.streams

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def load(self) -> float:
        return self._gate.load

    @property
    def memory(self) -> int:
        return self._supervisor.memory

    def join(self, init: protocol.Init, holder: str) -> Viewer:
        """A new stream, or one that is there already. `Refused` says why not."""
        if init.session is not None:
            viewer = self._all.get(init.session) or self._over.get(init.session)
            if viewer is None or viewer.holder != holder or (viewer.ended and viewer.last is None):
                raise Refused("no_session", "there is no such stream any more; begin another one")
            viewer.attach(init.after)
            return viewer
        if self.draining or not self._supervisor.ready:
            raise Refused("not_ready", "the server is not ready; try again in a moment", retryable=True)
        facts = self._facts(init, holder)
        if sum(viewer.holder == holder for viewer in self._all.values()) >= self._limits.streams:
            raise Refused(
                "too_many_streams", f"you have {self._limits.streams} streams; stop one of them", retryable=True
            )
        if len(self._waiting) >= self._limits.waiting:
            raise Refused("busy", f"{len(self._waiting)} streams wait already; try again later", retryable=True)
        viewer = Viewer(holder, init, facts, self._supervisor.order, self._metrics, self._files)
        self._all[viewer.id] = viewer
        task = asyncio.get_running_loop().create_task(self._care(viewer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._waiting.append(viewer)
        self._admit()
        return viewer

    def _facts(self, init: protocol.Init, holder: str) -> Facts:
        """The model to use, for a request that is possible."""
        streaming = {name: facts for name, facts in self._supervisor.models.items() if facts.streams}
        facts = streaming.get(init.model) if init.model is not None else next(iter(streaming.values()), None)
        if facts is None:
            have = f"it serves {', '.join(streaming)}" if streaming else "it has none that streams"
            raise Refused("no_model", f"this server has no stream of {init.model or 'any model'}; {have}")
        if init.steps is not None and init.steps not in facts.steps:
            counts = ", ".join(map(str, facts.steps))
            raise Refused("invalid_request", f"{facts.name} was trained for {counts} steps, not for {init.steps}")
        if init.seconds is not None and init.seconds > self._limits.seconds:
            raise Refused("invalid_request", f"a stream here has at most {self._limits.seconds:g} seconds")
        if init.snapshot is not None and self._files.path(init.snapshot, holder) is None:
            raise Refused("no_snapshot", "this server has no such snapshot of yours any more")
        return facts

    def _admit(self) -> None:
        """Begin as many of those that wait as there is room for."""
        while self._waiting and self._supervisor.ready and self._gate.admits(self._share(self._waiting[0])):
            viewer = self._waiting.popleft()
            self._gate.enter(self._share(viewer))
            viewer.active = True
            viewer.say(viewer.started())
            init, seconds = viewer.init, viewer.init.seconds or self._limits.seconds
            file = None if init.snapshot is None else self._files.path(init.snapshot, viewer.holder)
            order = Open(
                id=viewer.id, model=viewer.facts.name, prompt=init.prompt, seed=init.seed, steps=init.steps,
                chunks=chunks_of(viewer.facts, seconds), snapshot=file, acknowledged=init.ack, ahead=init.ahead,
            )  # fmt: skip
            self._supervisor.order(order, viewer.news.put_nowait)
            if not viewer.attached:  # it left while it waited, and may come back
                viewer.detach()
        for position, viewer in enumerate(self._waiting, 1):
            viewer.say(protocol.Queue(position=position))

    def _share(self, viewer: Viewer) -> float:
        """Share of the worker's time that it takes in addition to the others of its model."""
        facts = viewer.facts
        others = sum(o.active and o.facts.name == facts.name for o in self._all.values() if o is not viewer)
        return facts.taken(others + 1) - facts.taken(others)

    async def _care(self, viewer: Viewer) -> None:
        """From the beginning of a stream to its end."""
        pump = asyncio.get_running_loop().create_task(viewer.pump())
        try:
            while not (viewer.ended or pump.done()):
                await asyncio.wait([pump], timeout=0.25)
                self._check(viewer)
            if pump.done() and pump.exception() is not None:
                viewer.finish(protocol.Error(code="internal_error", message="the server failed", retryable=True))
        finally:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pump
            self._leave(viewer)

    def _check(self, viewer: Viewer) -> None:
        still = time.monotonic() - viewer.moved
        if not viewer.attached and still > self._limits.grace:
            viewer.finish(protocol.Done(chunks=viewer.chunks, frames=viewer.frames), wanted=True)
        elif viewer.rests and still > self._limits.idle:
            message = f"nothing was watched for {self._limits.idle:g} seconds"
            viewer.finish(protocol.Error(code="idle", message=message, retryable=True))

    def _leave(self, viewer: Viewer) -> None:
        self._all.pop(viewer.id, None)
        if viewer.active:
            self._gate.leave(self._share(viewer))
            self._supervisor.order(Close(id=viewer.id))
        elif viewer in self._waiting:
            self._waiting.remove(viewer)
        viewer.active = False
        if viewer.last is not None and not self.draining:
            self._keep(viewer)
        self._admit()

    def _keep(self, viewer: Viewer) -> None:
        """What its viewer has not got stays for the time of grace: of so many streams of one holder as may run at once."""
        mine = [id for id, other in self._over.items() if other.holder == viewer.holder]
        for id in mine[: len(mine) - self._limits.streams + 1]:
            del self._over[id]
        self._over[viewer.id] = viewer
        self._forget(viewer)

    def _forget(self, viewer: Viewer) -> None:
        """When nobody has come back for it in time."""
        left = viewer.moved + self._limits.grace - time.monotonic()
        if viewer.attached or left > 0:
            pause = self._limits.grace if viewer.attached else left
            asyncio.get_running_loop().call_later(pause, self._forget, viewer)
        elif self._over.get(viewer.id) is viewer:
            del self._over[viewer.id]

    async def drain(self, seconds: float) -> None:
        """Nothing new begins; those that are watched get `done` after the chunk that is being made, or after so many seconds."""
        self.draining = True
        until = time.monotonic() + seconds
        before = {viewer: viewer.chunks for viewer in self._all.values()}
        while before and time.monotonic() < until:
            for viewer, chunks in list(before.items()):
                if viewer.ended or viewer.chunks > chunks or viewer.paused or not (viewer.active and viewer.attached):
                    viewer.finish(protocol.Done(chunks=viewer.chunks, frames=viewer.frames))
                    del before[viewer]
            await asyncio.sleep(0.02)
        for viewer in list(self._all.values()):
            viewer.finish(protocol.Done(chunks=viewer.chunks, frames=viewer.frames))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)


def chunks_of(facts: Facts, seconds: float) -> int:
    """Chunks that last at least so long."""
    first, later = facts.chunk_frames
    return 1 + max(0, math.ceil((seconds * facts.fps - first) / later - 1e-9))
