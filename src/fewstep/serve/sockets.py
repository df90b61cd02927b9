"""`WS /v1/stream`: one connection of one viewer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fewstep.serve import protocol
from fewstep.serve.connections import DROP
from fewstep.serve.keys import Door
from fewstep.serve.limits import Limits
from fewstep.serve.metrics import Metrics
from fewstep.serve.viewer import Packet, Viewer
from fewstep.serve.viewers import Refused, Viewers

SUBPROTOCOL = "fewstep.v1"
POLICY, OVERLOADED = 1008, 1013
"""Codes with which a connection is closed: its client breaks the rules; try again later."""


class Unread(Exception):
    """The client does not read."""


@dataclass
class Sockets:
    """The endpoint."""

    viewers: Viewers
    door: Door
    limits: Limits
    metrics: Metrics
    origins: tuple[str, ...] = ()
    """Origins of pages that may connect, besides this server's own."""
    open: int = 0

    async def connect(self, socket: WebSocket) -> None:
        holder, ours = self._holder(socket), origin_allowed(socket.headers, self.origins)
        if holder is None or not ours or self.open >= self.limits.sockets:
            await socket.close(
                POLICY if self.open < self.limits.sockets else OVERLOADED
            )  # before it is accepted: HTTP 403
            return
        asked = socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in asked else None)
        self.open += 1
        self.metrics.sockets.set(self.open)
        try:
            await self._served(socket, holder)
        finally:
            self.open -= 1
            self.metrics.sockets.set(self.open)
            states = socket.client_state, socket.application_state
            if states == (WebSocketState.CONNECTED, WebSocketState.CONNECTED) and DROP in socket.scope["state"]:
                with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError, Unread):
                    await self._patiently(socket, socket.close())

    def _holder(self, socket: WebSocket) -> str | None:
        """Who connects: by a key in a header, or a ticket among the subprotocols. Neither is ever part of the address."""
        for word in socket.scope.get("subprotocols", []):
            if word.startswith("ticket."):
                return self.door.punch(word.removeprefix("ticket."))
        return self.door.enter(socket.headers.get("authorization"))

    async def _served(self, socket: WebSocket, holder: str) -> None:
        try:
            async with asyncio.timeout(self.limits.hello):
                init = protocol.heard(await _text(socket))
            if not isinstance(init, protocol.Init):
                raise ValueError("the first message is init")
            viewer = self.viewers.join(init, holder)
        except WebSocketDisconnect:
            return
        except TimeoutError:
            await _fail(socket, "timeout", f"no init within {self.limits.hello:g} seconds")
            return
        except Refused as error:
            self.metrics.refused.labels(error.code).inc()
            await _fail(socket, error.code, str(error), retryable=error.retryable)
            return
        except ValueError as error:
            await _fail(socket, "invalid_message", str(error))
            return
        outbox = viewer.outbox
        sender = asyncio.create_task(self._send(socket, viewer, outbox))
        receiver = asyncio.create_task(self._receive(socket, viewer))
        try:
            await asyncio.wait([sender, receiver], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)
            if viewer.outbox is outbox:  # nobody has come back meanwhile
                viewer.detach()

    async def _send(self, socket: WebSocket, viewer: Viewer, outbox: asyncio.Queue[Packet | None]) -> None:
        """What the viewer is to get, until nothing follows."""
        due = time.monotonic() + 1
        while True:
            try:
                packet = await asyncio.wait_for(outbox.get(), max(0.0, due - time.monotonic()))
            except TimeoutError:
                due = time.monotonic() + 1
                stats = protocol.Stats(
                    streams=self.viewers.streams, waiting=self.viewers.waiting, load=round(self.viewers.load, 3),
                    memory=self.viewers.memory, lead=round(viewer.lead, 3),
                )  # fmt: skip
                packet = Packet(stats.text())
            if packet is None:
                return
            await self._patiently(socket, socket.send_text(packet.text))
            for media in packet.media:
                await self._patiently(socket, socket.send_bytes(media))
            viewer.sent(packet)

    async def _patiently(self, socket: WebSocket, sending: Coroutine[Any, Any, None]) -> None:
        """Send something. `Unread` where the client does not read for too long: then the connection is dropped."""
        try:
            async with asyncio.timeout(self.limits.unread):
                await sending
        except TimeoutError:
            self.metrics.dropped.inc()
            socket.scope["state"].pop(DROP)(OVERLOADED, f"nothing was read for {self.limits.unread:g} seconds")
            raise Unread from None

    async def _receive(self, socket: WebSocket, viewer: Viewer) -> None:
        """What the viewer says, until it goes or stops."""
        recent = deque[float](maxlen=self.limits.messages)
        while True:
            message: protocol.Message | None = None
            try:
                text = await _text(socket)
                now = time.monotonic()
                if len(recent) == recent.maxlen and now - recent[0] < 1:
                    viewer.finish(_too_many(self.limits.messages), wanted=True)
                    await asyncio.sleep(1)  # for the sender
                    return
                recent.append(now)
                message = protocol.heard(text)
                if isinstance(message, protocol.Stop):
                    viewer.finish(protocol.Done(chunks=viewer.chunks, frames=viewer.frames), wanted=True)
                    await asyncio.sleep(1)
                    return
                viewer.hear(message)
            except WebSocketDisconnect:
                return
            except ValueError as error:
                id = getattr(message, "id", "")
                viewer.say(protocol.Error(code="invalid_message", message=str(error)[:500], fatal=False, id=id))


async def _text(socket: WebSocket) -> str:
    """The next message. ValueError for one that is no text, or too long."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    text = message.get("text")
    if text is None:
        raise ValueError("messages of clients are text; media goes the other way only")
    if len(text) > protocol.LARGEST:
        raise ValueError(f"a message has at most {protocol.LARGEST} bytes")
    return str(text)


async def _fail(socket: WebSocket, code: str, message: str, *, retryable: bool = False) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await socket.send_text(protocol.Error(code=code, message=message, retryable=retryable).text())
        await socket.close(OVERLOADED if retryable else POLICY)


def _too_many(most: int) -> protocol.Error:
    return protocol.Error(code="too_many_messages", message=f"at most {most} messages per second are read")


def origin_allowed(headers: Mapping[str, str], origins: tuple[str, ...]) -> bool:
    """Whether a page of this origin may connect: one of this server, or of the list. Programs send no origin."""
    origin = headers.get("origin")
    if origin is None:
        return True
    return origin in origins or origin.partition("://")[2] == headers.get("host")
