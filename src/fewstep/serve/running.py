"""Running a server: its two ports, and an end in which every viewer is told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import uvicorn

from fewstep.serve import protocol
from fewstep.serve.app import Server
from fewstep.serve.connections import Connection
from fewstep.serve.limits import LOOPBACK
from fewstep.serve.tables import alone

DRAIN = 10.0
"""Seconds that viewers are given at the end."""


class Web(uvicorn.Server):
    """A web server that says goodbye to viewers before it closes their connections."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._server.drain(DRAIN)
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
        server.app(), host=host, port=port, log_level="warning", access_log=False, loop="asyncio", ws=Connection,
        ws_max_size=protocol.LARGEST, timeout_graceful_shutdown=5, server_header=False,
    )  # fmt: skip
    return Web(config, server)


async def run(server: Server, host: str, port: int, watch_port: int | None, ready: Callable[[str], None]) -> None:
    """Serve until a signal comes. `ready` is called with the address when the models are warm. ValueError when they cannot be
    served, or the port cannot be had; FolderInUse when another server has the folder."""
    with alone(server.folder, server.table):
        web, listening = web_server(server, host, port), _bound(host, port)
        serving = asyncio.create_task(web.serve([listening]))
        watching: asyncio.Task[None] | None = None
        if watch_port is not None:
            config = uvicorn.Config(server.watch(), host=host, port=watch_port, log_level="warning", access_log=False)
            watch, seen = uvicorn.Server(config), _bound(host, watch_port)
            watching = asyncio.create_task(watch._serve([seen]))
        warm = asyncio.create_task(server.supervisor.until_ready())
        try:
            await asyncio.wait([serving, warm], return_when=asyncio.FIRST_COMPLETED)
            if warm.done():
                if warm.exception() is not None:
                    web.should_exit = True
                    await serving
                    warm.result()
                name, *_ = listening.getsockname()
                ready(f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}")
            await serving
        finally:
            warm.cancel()
            if watching is not None:
                watch.should_exit = True
                await asyncio.gather(watching, return_exceptions=True)


def _bound(host: str, port: int) -> socket.socket:
    """A socket of this address. ValueError where it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(f"{host}, port {port}: {why}; give another --port or --host") from None
