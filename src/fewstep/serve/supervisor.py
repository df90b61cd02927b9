"""The server's side of the worker: it starts the process, passes orders and news, and starts another one when it dies."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

from fewstep.serve.orders import Beat, Close, Down, Facts, Failed, Finished, Made, News, Order, Up
from fewstep.serve.worker import Served, run

HANGS = 120.0
"""Seconds without a word after which a worker counts as hanging and is killed. A network call must not take longer."""
PAUSES = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds before a worker that died is started again: after the first death, the second, and so on."""
STARTS: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
"""How workers are started: as new programs, since CUDA does not work in a fork."""
log = logging.getLogger(__name__)
Hear = Callable[[News], None]


class Supervisor:
    """One worker process. All methods are for the event loop's thread."""

    def __init__(self, served: Served, *, hangs: float = HANGS) -> None:
        self._served, self._hangs = served, hangs
        self._listeners: dict[str, Hear] = {}
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._watch: asyncio.Task[None] | None = None
        self._up, self._stopping = asyncio.Event(), False
        self._since = self._heard_at = time.monotonic()
        self.models: dict[str, Facts] = {}
        """What is served, by name; what was known of it stays while a worker is started again."""
        self.memory = 0
        """Bytes that the worker holds."""
        self.deaths = 0
        """How often a worker has died."""
        self.failure = ""
        """Why there is no worker and will be none."""

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def begin(self) -> None:
        """Start the worker. It is `ready` when its models are loaded and warm."""
        here, there = STARTS.Pipe()
        self._process = STARTS.Process(target=run, args=(there, self._served), name="fewstep-worker", daemon=True)
        self._process.start()
        there.close()
        self._pipe = here
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(here, loop), name="news", daemon=True).start()
        if self._watch is None:
            self._watch = loop.create_task(self._watching())

    async def until_ready(self) -> None:
        """ValueError when the worker cannot start."""
        await self._up.wait()
        if self.failure:
            raise ValueError(self.failure)

    async def end(self) -> None:
        """Stop the worker, at once."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.terminate()
            await asyncio.to_thread(self._process.join, 5)
            if self._process.is_alive():
                self._process.kill()

    def order(self, order: Order, hear: Hear | None = None) -> None:
        """Send an order; `hear` is called with all news of its task. Without a worker, the task is told so."""
        if hear is not None:
            self._listeners[order.id] = hear
        if isinstance(order, Close):
            self._listeners.pop(order.id, None)
        if not self.ready or self._pipe is None:
            self._lost(order.id)
            return
        try:
            self._pipe.send(order)
        except (OSError, ValueError):  # it dies; who reads will see it
            self._lost(order.id)

    def _read(self, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: everything that the worker says."""
        while True:
            try:
                news = pipe.recv()
            except (EOFError, OSError, TypeError):  # TypeError: closed while it was read
                if not self._stopping:
                    loop.call_soon_threadsafe(self._died, pipe)
                return
            loop.call_soon_threadsafe(self._heard, news)

    def _heard(self, news: Up | Down | Beat | News) -> None:
        self._heard_at = time.monotonic()
        match news:
            case Beat():
                self.memory = news.memory
            case Up():
                self.models = {facts.name: facts for facts in news.models}
                self._since = time.monotonic()
                self._up.set()
            case Down():
                self.failure, self._stopping = news.message, True
                self._up.set()
            case _:
                last = isinstance(news, Failed | Finished | Made)
                hear = self._listeners.pop(news.id, None) if last else self._listeners.get(news.id)
                if hear is not None:
                    hear(news)

    def _lost(self, name: str) -> None:
        hear = self._listeners.pop(name, None)
        if hear is not None:
            message = "the worker has stopped and is being started again; try again in a moment"
            asyncio.get_running_loop().call_soon(
                hear, Failed(id=name, code="worker_lost", message=message, retryable=True)
            )

    def _died(self, pipe: Connection) -> None:
        """Tell everybody, and start another worker."""
        if pipe is not self._pipe or self._stopping:
            return
        self._up.clear()
        lived = time.monotonic() - self._since
        self.deaths = self.deaths + 1
        for name in list(self._listeners):
            self._lost(name)
        pause = PAUSES[min(self.deaths - 1, len(PAUSES) - 1)] if lived < 600 else 0.0
        log.error("the worker died; another one starts in %g s", pause)
        asyncio.get_running_loop().call_later(pause, self._again)

    def _again(self) -> None:
        if not self._stopping:
            self.begin()

    async def _watching(self) -> None:
        """Kill a worker that hangs."""
        while True:
            await asyncio.sleep(min(1.0, self._hangs / 4))
            if self.ready and self._process is not None and time.monotonic() - self._heard_at > self._hangs:
                log.error("the worker has said nothing for %g s and is killed", self._hangs)
                self._process.kill()
