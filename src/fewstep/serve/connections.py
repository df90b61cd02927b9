"""A WebSocket connection that ends also where its client reads nothing."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

LINGER = 5.0
"""Seconds that a client is given to read what was sent before its connection was closed."""
SENT = 1 << 17
"""Bytes that are sent and not received, of one client, or twice as many, as the system counts. It would take megabytes."""
DROP = "fewstep.drop"
"""Where in the state of a WebSocket's scope the function is that drops it: `drop(code, reason)`."""


class Connection(WebSocketsSansIOProtocol):
    """Whoever sends to a client that reads nothing waits without end, and closing waits for what was sent. So what waits can be
    dropped, and what is closed is cut off after a while."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:  # its application begins later
            self.scope["state"][DROP] = self._drop

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.loop.call_later(LINGER, self._cut)

    def _cut(self) -> None:
        if not self.disconnected:
            self.transport.abort()

    def _drop(self, code: int, reason: str) -> None:
        """Say why, behind what waits to be read. Nothing more can be sent."""
        if self.conn.state is State.OPEN:
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
