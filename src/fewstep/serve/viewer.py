"""One stream as the server knows it: what its viewer has said, and what it has yet to get. No sockets here."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from fewstep.serve import protocol
from fewstep.serve.media import Encoder, encoder
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import (
    Applies,
    Declined,
    Facts,
    Failed,
    Finished,
    News,
    Order,
    Play,
    Played,
    Press,
    Save,
    Saved,
    Shown,
    Steer,
)
from fewstep.serve.pace import AHEAD
from fewstep.serve.snapshots import SnapshotFiles


@dataclass(frozen=True)
class Packet:
    """Messages that belong together."""

    text: str
    media: tuple[bytes, ...] = ()
    chunk: bool = False
    """Whether it is a chunk of frames."""


@dataclass(eq=False)
class Viewer:
    """One stream and whoever watches it. It outlives its connection for a while."""

    holder: str
    init: protocol.Init
    facts: Facts
    order: Callable[[Order], None]
    metrics: Metrics
    files: SnapshotFiles
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    began: float = field(default_factory=time.monotonic)
    active: bool = False
    """Whether the worker makes it."""
    ended: bool = False
    last: Packet | None = None
    """Its last message, for a viewer who was not there; None: nobody comes back, or it has not ended."""
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
            realtime=facts.load <= 1, licence=facts.licence, keys=facts.keys, switches=facts.switches,
        )  # fmt: skip

    def hear(self, message: protocol.Message) -> None:
        """A message of its viewer. ValueError for one that makes no sense now."""
        self.moved = time.monotonic()
        if self.ended:
            return
        if not self.active and not isinstance(message, protocol.Stop):
            raise ValueError("the stream has not begun; wait for started")
        match message:
            case protocol.Prompt():
                steer = Steer(id=self.id, prompt=message.prompt, how=message.how, chunk=message.chunk, token=message.id)
                self.order(steer)
            case protocol.Control():
                self._require_keys(message.keys)
                self.order(Press(id=self.id, keys=message.keys, chunk=message.chunk, token=message.id))
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

    def _require_keys(self, keys: tuple[str, ...]) -> None:
        """ValueError for keys that the model does not read."""
        if not self.facts.keys:
            raise ValueError(f"{self.facts.name} reads no keys; /v1/models has the keys of each model")
        if unknown := sorted(set(keys) - set(self.facts.keys)):
            raise ValueError(f"unknown key {', '.join(unknown)}; {self.facts.name} reads {', '.join(self.facts.keys)}")

    def sent(self, packet: Packet) -> None:
        """A packet has left."""
        if packet.chunk:
            self.unsent -= 1
            if self.throttled and self.unsent <= 1:
                self.throttled = False
                self._play()

    async def pump(self) -> None:
        """Turn news into messages, in their order, until the stream ends."""
        with closing(encoder(self.init.media, self.facts.fps)) as media:
            await self._pump(media)

    async def _pump(self, media: Encoder) -> None:
        while not self.ended:
            news = await self.news.get()
            self.moved = time.monotonic()
            match news:
                case Shown():
                    await self._chunk(news, media)
                case Applies():
                    said = protocol.Applied(id=news.token, chunk=news.chunk, prompt=news.prompt, keys=news.keys)
                    self.say(said)
                case Declined():
                    message = news.message
                    self.say(protocol.Error(code="invalid_request", message=message, fatal=False, id=news.token))
                case Saved():
                    self.files.keep(news.name, self.holder)
                    self.say(protocol.Saved(name=news.name, chunk=news.chunk, bytes=news.bytes))
                case Finished():
                    self.finish(protocol.Done(chunks=self.chunks, frames=self.frames))
                case Failed():
                    self.finish(protocol.Error(code=news.code, message=news.message, retryable=news.retryable))

    async def _chunk(self, news: Shown, media: Encoder) -> None:
        start = time.perf_counter()
        made = await asyncio.to_thread(media.add, news.frames)
        took = 1000 * (time.perf_counter() - start)
        denoise, commit, decode = news.took
        if not self.chunks:
            self.metrics.first_frame.observe(time.monotonic() - self.began)
        self.metrics.chunk(denoise, commit, decode, took)
        message = protocol.Chunk(
            index=news.index, first=news.first, pts=news.seconds, frames=len(news.frames), messages=len(made), prompt=news.prompt,
            version=news.version, keys=news.keys, denoise_ms=round(denoise, 2), commit_ms=round(commit, 2),
            decode_ms=round(decode, 2), encode_ms=round(took, 2),
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
        if self.active or self.chunks:
            self.say(self.started())
        for index, _, packet in self.kept:
            if index > after:
                self.outbox.put_nowait(packet)
                self.unsent += 1
        if self.last is not None:
            self.outbox.put_nowait(self.last)
            self.outbox.put_nowait(None)
        elif self.active:
            self._play()

    def detach(self) -> None:
        """Its connection is gone."""
        self.attached, self.moved = False, time.monotonic()
        if self.active and not self.ended:
            self._play()

    def finish(self, message: protocol.Said, *, wanted: bool = False) -> None:
        """The last message. `wanted`: its viewer is done with it, and will not come back for what it has not got."""
        if not self.ended:
            self.say(message)
            self.ended, self.moved, self.last = True, time.monotonic(), Packet(message.text())
            self.outbox.put_nowait(None)
        self.last = None if wanted else self.last

    @property
    def rests(self) -> bool:
        """Whether it is up to its viewer that nothing happens: not where it waits for the worker."""
        behind = self.init.ack and self.frames > self.played
        return self.active and (self.paused or self.throttled or behind)

    @property
    def lead(self) -> float:
        """Seconds that it is ahead of its viewer, if that says what it has played."""
        return (self.frames - self.played) / self.facts.fps if self.init.ack else 0.0
