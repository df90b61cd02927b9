"""Running a server: its two ports, and an end in which every viewer is told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from fewstep.serve import protocol
from fewstep.serve.app import Server

DRAIN = 10.0
"""Seconds that viewers are given at the end."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Web(uvicorn.Server):
    """A web server that says goodbye to viewers before it closes their connections."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._server.viewers.drain(DRAIN)
        await super().shutdown(sockets)


def require_private(host: str, server: Server) -> None:
    """ValueError for a server without keys that others could reach."""
    if host not in LOOPBACK and server.door.keys is None:
        raise ValueError(
            f"--host {host}: others could reach this server, and it has no keys; make a file by --keys FILE --new-key NAME and "
            "start it with --keys FILE, or leave --host out"
        )


def web_server(server: Server, host: str, port: int) -> Web:
    """What clients reach. ValueError as of `require_private`."""
    require_private(host, server)
    config = uvicorn.Config(
        server.app(), host=host, port=port, log_level="warning", access_log=False, loop="asyncio", ws="websockets-sansio",
        ws_max_size=protocol.LARGEST, timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip
    return Web(config, server)


async def run(server: Server, host: str, port: int, watch_port: int | None, ready: Callable[[], None]) -> None:
    """Serve until a signal comes. `ready` is called when the models are warm. ValueError when they cannot be served."""
    web = web_server(server, host, port)
    serving = asyncio.create_task(web.serve())
    watching: asyncio.Task[None] | None = None
    if watch_port is not None:
        config = uvicorn.Config(server.watch(), host=host, port=watch_port, log_level="warning", access_log=False)
        watch = uvicorn.Server(config)
        watch.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        watching = asyncio.create_task(watch._serve())
    warm = asyncio.create_task(server.supervisor.until_ready())
    try:
        await asyncio.wait([serving, warm], return_when=asyncio.FIRST_COMPLETED)
        if warm.done():
            if warm.exception() is not None:
                web.should_exit = True
                await serving
                warm.result()
            ready()
        await serving
    finally:
        warm.cancel()
        if watching is not None:
            watch.should_exit = True
            await asyncio.gather(watching, return_exceptions=True)
