"""A server in a thread, with a real worker process, and viewers that talk to it.

The worker is forked from a process that has imported everything; test_serve_command.py starts it as the command does.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from fewstep.attention import BlockCausal
from fewstep.compress import FrameInput
from fewstep.diffusion import Contract, Exact, Renoise, Shifted, Stream
from fewstep.models import VideoModel
from fewstep.models.repattern import repattern
from fewstep.serve import supervisor
from fewstep.serve.app import Server
from fewstep.serve.running import Web, web_server
from fewstep.serve.worker import Served
from support_engine import shaken, tiny_model
from support_processes import forked

KEYS = FrameInput(name="keys", width=4, words=("left", "right", "up", "down"), default=0.0)


def save_streaming(folder: Path, fps: int = 50, keys: FrameInput | None = None) -> Path:
    """A tiny student in chunks of 2 frames, in 2 steps or 1; with `keys` it reads them."""
    model = tiny_model()
    grid = Exact(grids=((1.0, 0.5, 0.0), (1.0, 0.0)), otherwise=Shifted())
    contract = Contract(sampler=Renoise(), steps=2, grid=grid, stream=Stream(chunks=(2,), window=6, sink=2))
    network = repattern(model.denoiser, BlockCausal(chunk=2, window=6, sink=2))
    student = model.with_part("denoiser", network, contract=contract, role="student", fps=fps)
    if keys is not None:
        student = student.transformed(keys)
        shaken(student.denoiser.backbone.signals, 0.5)
    return student.save(folder)


@dataclass(frozen=True, kw_only=True)
class Stuck(Served):
    """Models whose decoders hang while there is a file."""

    hangs: Path

    def load(self) -> dict[str, VideoModel]:
        models = super().load()
        for model in models.values():
            decode = model.codec.decode_next

            def waits(*args: Any, decode: Callable[..., Any] = decode, **options: Any) -> Any:
                while self.hangs.exists():
                    time.sleep(0.05)
                return decode(*args, **options)

            model.codec.decode_next = waits
        return models


class Mute:
    """A connection that reads only when it is told to, so that what it is sent stays with the server."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        lines = ("GET /v1/stream HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: Upgrade", "Upgrade: websocket")
        more = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", "", "")
        self.socket.sendall("\r\n".join(lines + more).encode())
        head = self.socket.recv(4096)  # nothing else is sent before it has said something
        assert head.startswith(b"HTTP/1.1 101"), head

    def say(self, kind: str, **fields: Any) -> None:
        text = json.dumps({"type": kind, **fields}).encode()
        assert len(text) < 126
        self.socket.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)  # masked by zeros

    def rest(self) -> bytes:
        """Everything until the server ends the connection."""
        found = bytearray()
        with suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 16):
                found += data
        return bytes(found)

    def close(self) -> None:
        self.socket.close()


@dataclass
class Running:
    """A server that answers."""

    server: Server
    web: Web
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def viewer(self, **init: Any) -> Viewer:
        """A connection that has said `init`."""
        viewer = self.connect()
        viewer.say("init", **init)
        return viewer

    def connect(self, **options: Any) -> Viewer:
        return Viewer(connect(f"ws://127.0.0.1:{self.port}/v1/stream", max_size=None, legacy=True, **options))

    def quiet(self) -> bool:
        """Whether no stream is served any more, soon."""
        viewers = self.server.viewers
        return settled(lambda: bool(self.on_loop(lambda: viewers.streams + viewers.waiting == 0)))

    def on_loop(self, call: Any) -> Any:
        """The result of a call in the server's thread."""

        async def result() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(result(), self.loop).result(10)


@dataclass
class Viewer:
    """One connection: what it has heard."""

    socket: ClientConnection
    heard: list[dict[str, Any]] = field(default_factory=list)
    media: list[bytes] = field(default_factory=list)

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def until(self, kind: str, timeout: float = 20.0, **fields: Any) -> dict[str, Any]:
        """Listen until a message of this type, with these fields."""
        while True:
            message = self.socket.recv(timeout)
            if isinstance(message, bytes):
                self.media.append(message)
                continue
            told = json.loads(message)
            self.heard.append(told)
            if told["type"] == kind and all(told[name] == value for name, value in fields.items()):
                for _ in range(told.get("messages", 0)):
                    self.media.append(self.socket.recv(timeout))  # type: ignore[arg-type]
                return dict(told)

    def frames(self) -> torch.Tensor:
        """The pictures that it has got, uint8 `[F, H, W, 3]`."""
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in self.media]))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """All messages of this type that it has heard."""
        return [message for message in self.heard if message["type"] == kind]

    def close(self) -> None:
        self.socket.close()


def settled(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


@contextmanager
def running(server: Server) -> Iterator[Running]:
    """The server until the block ends, warm. For a second after its worker has died there is none."""
    with patch.object(supervisor, "STARTS", forked()), patch.object(supervisor, "PAUSES", (1.0,)):
        yield from _running(server)


def _running(server: Server) -> Iterator[Running]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    web, loops, up = web_server(server, "127.0.0.1", port), list[asyncio.AbstractEventLoop](), threading.Event()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.create_task(web.serve())
        while not web.started and not serving.done():
            await asyncio.sleep(0.01)
        try:
            await server.supervisor.until_ready()
        except ValueError:
            web.should_exit = True
        up.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert up.wait(120) and not server.supervisor.failure, "the server did not start"
        yield Running(server, web, port, loops[0])
    finally:
        web.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
