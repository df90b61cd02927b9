"""Streams as the server knows them: who waits, who watches, and what each viewer has yet to get. No sockets here."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fewstep.serve import protocol
from fewstep.serve.limits import Limits
from fewstep.serve.media import encoder
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import (
    Applies,
    Close,
    Declined,
    Facts,
    Failed,
    Finished,
    News,
    Open,
    Order,
    Play,
    Played,
    Save,
    Saved,
    Shown,
    Steer,
)
from fewstep.serve.pace import AHEAD, Gate
from fewstep.serve.supervisor import Supervisor


@dataclass(frozen=True)
class Packet:
    """Messages that belong together."""

    text: str
    media: tuple[bytes, ...] = ()
    chunk: bool = False
    """Whether it is a chunk of frames."""


class Refused(ValueError):
    """A stream that cannot be begun, with the code that clients are told."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable


@dataclass(eq=False)
class Viewer:
    """One stream and whoever watches it. It outlives its connection for a while."""

    holder: str
    init: protocol.Init
    facts: Facts
    order: Callable[[Order], None]
    metrics: Metrics
    snapshots: dict[str, str]
    """Holders of the snapshots on this server, by name."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    began: float = field(default_factory=time.monotonic)
    active: bool = False
    """Whether the worker makes it."""
    ended: bool = False
    attached: bool = True
    paused: bool = False
    """By its viewer."""
    outbox: asyncio.Queue[Packet | None] = field(default_factory=asyncio.Queue)
    """What is to be sent; None: nothing follows."""
    kept: deque[tuple[int, int, Packet]] = field(default_factory=deque)
    """The last chunks, which a viewer may not have got: number, first frame after it, packet."""
    news: asyncio.Queue[News] = field(default_factory=asyncio.Queue)
    unsent: int = 0
    """Chunks in the outbox."""
    throttled: bool = False
    chunks: int = 0
    frames: int = 0
    played: int = 0
    moved: float = field(default_factory=time.monotonic)
    """When something last happened."""

    def say(self, message: protocol.Said) -> None:
        if self.attached:
            self.outbox.put_nowait(Packet(message.text()))

    def started(self) -> protocol.Started:
        facts, steps = self.facts, self.init.steps or self.facts.steps[0]
        return protocol.Started(
            session=self.id, model=facts.name, prompt=self.init.prompt, seed=self.init.seed, steps=steps, fps=facts.fps,
            width=facts.width, height=facts.height, chunk_frames=facts.chunk_frames, media=self.init.media,
            realtime=facts.load <= 1, licence=facts.licence,
        )  # fmt: skip

    def hear(self, message: protocol.Message) -> None:
        """A message of its viewer. ValueError for one that makes no sense now."""
        self.moved = time.monotonic()
        if not self.active and not isinstance(message, protocol.Stop):
            raise ValueError("the stream has not begun; wait for started")
        match message:
            case protocol.Prompt():
                self.order(Steer(id=self.id, prompt=message.prompt, how=message.how, token=message.id))
            case protocol.Ack():
                self.played = max(self.played, min(message.frames, self.frames))
                while self.kept and self.kept[0][1] <= self.played:
                    self.kept.popleft()
                self.order(Played(id=self.id, frames=self.played))
            case protocol.Pause() | protocol.Resume():
                self.paused = isinstance(message, protocol.Pause)
                self._play()
            case protocol.Snapshot():
                self.order(Save(id=self.id))
            case protocol.Init():
                raise ValueError("the stream has begun already; send stop, and init in a new connection")

    def sent(self, packet: Packet) -> None:
        """A packet has left."""
        if packet.chunk:
            self.unsent -= 1
            if self.throttled and self.unsent <= 1:
                self.throttled = False
                self._play()

    async def pump(self) -> None:
        """Turn news into messages, in their order, until the stream ends."""
        media = encoder(self.init.media, self.facts.fps)
        while not self.ended:
            news = await self.news.get()
            self.moved = time.monotonic()
            match news:
                case Shown():
                    await self._chunk(news, media)
                case Applies():
                    self.say(protocol.Applied(id=news.token, chunk=news.chunk, prompt=news.prompt))
                case Declined():
                    self.say(protocol.Error(code="invalid_request", message=news.message, fatal=False))
                case Saved():
                    self.snapshots[news.name] = self.holder
                    self.say(protocol.Saved(name=news.name, chunk=news.chunk, bytes=news.bytes))
                case Finished():
                    self.finish(protocol.Done(chunks=self.chunks, frames=self.frames))
                case Failed():
                    self.finish(protocol.Error(code=news.code, message=news.message, retryable=news.retryable))

    async def _chunk(self, news: Shown, media: Any) -> None:
        start = time.perf_counter()
        made = await asyncio.to_thread(media.add, news.frames)
        took = 1000 * (time.perf_counter() - start)
        denoise, commit, decode = news.took
        if not self.chunks:
            self.metrics.first_frame.observe(time.monotonic() - self.began)
        self.metrics.chunk(denoise, commit, decode, took)
        message = protocol.Chunk(
            index=news.index, first=news.first, pts=news.seconds, frames=len(news.frames), messages=len(made), prompt=news.prompt,
            version=news.version, denoise_ms=round(denoise, 2), commit_ms=round(commit, 2), decode_ms=round(decode, 2),
            encode_ms=round(took, 2),
        )  # fmt: skip
        self.chunks, self.frames = news.index + 1, news.first + len(news.frames)
        packet = Packet(message.text(), tuple(made), chunk=True)
        self.kept.append((news.index, self.frames, packet))
        while len(self.kept) > AHEAD + 2 and not self.init.ack:
            self.kept.popleft()
        if self.attached:
            self.outbox.put_nowait(packet)
            self.unsent += 1
            if self.unsent > AHEAD and not self.throttled:
                self.throttled = True
                self._play()

    def _play(self) -> None:
        self.order(Play(id=self.id, on=self.attached and not (self.paused or self.throttled)))

    def attach(self, after: int) -> None:
        """Its viewer is back, and has the chunks up to `after`. A connection that it may still have is given up."""
        self.outbox.put_nowait(None)
        self.outbox, self.unsent, self.throttled, self.attached = asyncio.Queue(), 0, False, True
        self.moved = time.monotonic()
        if self.active:
            self.say(self.started())
        for index, _, packet in self.kept:
            if index > after:
                self.outbox.put_nowait(packet)
                self.unsent += 1
        if self.active:
            self._play()

    def detach(self) -> None:
        """Its connection is gone."""
        self.attached, self.moved = False, time.monotonic()
        if self.active and not self.ended:
            self._play()

    def finish(self, message: protocol.Said) -> None:
        """The last message."""
        if not self.ended:
            self.say(message)
            self.ended = True
            self.outbox.put_nowait(None)

    @property
    def rests(self) -> bool:
        """Whether it is up to its viewer that nothing happens: not where it waits for the worker."""
        behind = self.init.ack and self.frames > self.played
        return self.active and (self.paused or self.throttled or behind)

    @property
    def lead(self) -> float:
        """Seconds that it is ahead of its viewer, if that says what it has played."""
        return (self.frames - self.played) / self.facts.fps if self.init.ack else 0.0


class Viewers:
    """All streams of a server."""

    def __init__(self, supervisor: Supervisor, limits: Limits, metrics: Metrics) -> None:
        self._supervisor, self._limits, self._metrics = supervisor, limits, metrics
        self._gate = Gate()
        self._all: dict[str, Viewer] = {}
        self._waiting = deque[Viewer]()
        self._tasks = set[asyncio.Task[None]]()
        self.snapshots: dict[str, str] = {}
        """Holders of the snapshots on this server, by name."""
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
            viewer = self._all.get(init.session)
            if viewer is None or viewer.ended or viewer.holder != holder:
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
        viewer = Viewer(holder, init, facts, self._supervisor.order, self._metrics, self.snapshots)
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
        if init.snapshot is not None and self.snapshots.get(init.snapshot) != holder:
            raise Refused("no_snapshot", "this server has no such snapshot of yours any more")
        return facts

    def _admit(self) -> None:
        """Begin as many of those that wait as there is room for."""
        while self._waiting and self._supervisor.ready and self._gate.admits(self._waiting[0].facts.load):
            viewer = self._waiting.popleft()
            self._gate.enter(viewer.facts.load)
            viewer.active = True
            viewer.say(viewer.started())
            init, seconds = viewer.init, viewer.init.seconds or self._limits.seconds
            order = Open(
                id=viewer.id, model=viewer.facts.name, prompt=init.prompt, seed=init.seed, steps=init.steps,
                chunks=chunks_of(viewer.facts, seconds), snapshot=init.snapshot, acknowledged=init.ack,
            )  # fmt: skip
            self._supervisor.order(order, viewer.news.put_nowait)
            if not viewer.attached:  # it left while it waited, and may come back
                viewer.detach()
        for position, viewer in enumerate(self._waiting, 1):
            viewer.say(protocol.Queue(position=position))

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
            viewer.finish(protocol.Done(chunks=viewer.chunks, frames=viewer.frames))
        elif viewer.rests and still > self._limits.idle:
            message = f"nothing was watched for {self._limits.idle:g} seconds"
            viewer.finish(protocol.Error(code="idle", message=message, retryable=True))

    def _leave(self, viewer: Viewer) -> None:
        self._all.pop(viewer.id, None)
        if viewer.active:
            self._gate.leave(viewer.facts.load)
            self._supervisor.order(Close(id=viewer.id))
        elif viewer in self._waiting:
            self._waiting.remove(viewer)
        viewer.active = False
        self._admit()

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
