"""The server: its routes, and its life from the first request to the last."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from fewstep.serve.keys import Door
from fewstep.serve.limits import Limits
from fewstep.serve.metrics import Metrics
from fewstep.serve.page_files import PageFiles
from fewstep.serve.sockets import Sockets, origin_allowed
from fewstep.serve.supervisor import HANGS, Supervisor
from fewstep.serve.viewers import Viewers
from fewstep.serve.worker import Served


@dataclass
class Server:
    """Everything that one server has."""

    served: Served
    limits: Limits = Limits()
    door: Door = field(default_factory=Door)
    origins: tuple[str, ...] = ()
    folder: Path = Path("served")
    """Where finished clips, their table, and snapshots are."""
    hangs: float = HANGS
    metrics: Metrics = field(default_factory=Metrics)
    supervisor: Supervisor = field(init=False)
    viewers: Viewers = field(init=False)

    def __post_init__(self) -> None:
        self.snapshots = self.folder / "snapshots"
        self.snapshots.mkdir(parents=True, exist_ok=True)
        self.supervisor = Supervisor(replace(self.served, folder=self.snapshots), hangs=self.hangs)
        self.viewers = Viewers(self.supervisor, self.limits, self.metrics)

    def app(self) -> Starlette:
        """What clients reach."""
        sockets = Sockets(self.viewers, self.door, self.limits, self.metrics, self.origins)
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/stream/tickets", self._guarded(self._ticket), methods=["POST"]),
            Route("/v1/stream/snapshots/{name}", self._guarded(self._snapshot)),
            WebSocketRoute("/v1/stream", sockets.connect),
            Mount("/", PageFiles()),
        ]
        return Starlette(routes=routes, lifespan=self._life, exception_handlers={HTTPException: _told})

    def watch(self) -> Starlette:
        """What operators reach, on a port of its own."""
        routes = [Route("/health", self._health), Route("/ready", self._ready), Route("/metrics", self._metrics)]
        return Starlette(routes=routes)

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.supervisor.begin()
        try:
            yield
        finally:
            await self.supervisor.end()

    def _guarded(
        self, answer: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Only for holders of a key, where there are keys."""

        async def guarded(request: Request) -> Response:
            holder = self.door.enter(request.headers.get("authorization"))
            if holder is None:
                raise HTTPException(401, "a key is missing or wrong; send Authorization: Bearer KEY")
            if not origin_allowed(request.headers, self.origins):
                raise HTTPException(403, "pages of this origin may not use this server; start it with --origin")
            return await answer(request, holder)

        return guarded

    async def _models(self, _: Request, holder: str) -> Response:
        data = [
            {"id": name, "object": "model", "owned_by": "fewstep", **asdict(facts)}
            for name, facts in self.supervisor.models.items()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _ticket(self, _: Request, holder: str) -> Response:
        return JSONResponse({"ticket": self.door.ticket(holder)})

    async def _snapshot(self, request: Request, holder: str) -> Response:
        name = request.path_params["name"]
        if self.viewers.snapshots.get(name) != holder:
            raise HTTPException(404, "there is no such snapshot of yours any more")
        return FileResponse(self.snapshots / name, filename="stream.safetensors")

    async def _health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, _: Request) -> Response:
        ready = self.supervisor.ready and not self.supervisor.failure and not self.viewers.draining
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def _metrics(self, _: Request) -> Response:
        metrics = self.metrics
        metrics.streams.set(self.viewers.streams)
        metrics.waiting.set(self.viewers.waiting)
        metrics.load.set(self.viewers.load)
        metrics.deaths.set(self.supervisor.deaths)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


async def _told(_: Request, error: Exception) -> Response:
    """Errors in the shape of OpenAI's API."""
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body: dict[str, Any] = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)
