"""The server: its routes, and its life from the first request to the last."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from fewstep.serve.clips import Clips
from fewstep.serve.database import TableDown
from fewstep.serve.errors import ApiError, told
from fewstep.serve.jobs import Jobs
from fewstep.serve.keys import Door
from fewstep.serve.limits import LOOPBACK, Limits
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import Facts
from fewstep.serve.page_files import PageFiles
from fewstep.serve.snapshots import SnapshotFiles
from fewstep.serve.sockets import Sockets, origin_allowed
from fewstep.serve.supervisor import HANGS, Supervisor
from fewstep.serve.tables import table_of
from fewstep.serve.videos import Videos
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
    table: str | None = None
    """A table of jobs that other servers share, with this folder: see `fewstep.serve.database`. None: one in the folder."""
    hangs: float = HANGS
    metrics: Metrics = field(default_factory=Metrics)
    began: float = field(default_factory=time.time)
    supervisor: Supervisor = field(init=False)
    snapshots: SnapshotFiles = field(init=False)
    viewers: Viewers = field(init=False)
    jobs: Jobs = field(init=False)
    clips: Clips = field(init=False)

    def __post_init__(self) -> None:
        written = self.folder / "snapshots"
        written.mkdir(parents=True, exist_ok=True)
        self.snapshots = SnapshotFiles(written, self.limits.kept, self.limits.snapshots)
        self.supervisor = Supervisor(replace(self.served, folder=written), hangs=self.hangs)
        self.viewers = Viewers(self.supervisor, self.snapshots, self.limits, self.metrics)
        self.jobs = table_of(self.folder, self.table, self.limits.kept)
        shared = self.table is not None
        self.clips = Clips(self.jobs, self.folder / "videos", self.supervisor, self.metrics, shared=shared)

    def app(self) -> Starlette:
        """What clients reach."""
        sockets = Sockets(self.viewers, self.door, self.limits, self.metrics, self.origins)
        videos = Videos(self.jobs, self.clips, self.supervisor, self.limits, self.folder, self.metrics)
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            *videos.routes(self._guarded),
            Route("/v1/stream/tickets", self._guarded(self._ticket), methods=["POST"]),
            Route("/v1/stream/snapshots/{name}", self._guarded(self._snapshot)),
            WebSocketRoute("/v1/stream", sockets.connect),
            Mount("/", PageFiles()),
        ]
        middleware = []
        if self.door.keys is None:  # else a page could reach this machine under a name of its own
            middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"], www_redirect=False)]
        handlers = {HTTPException: told, TableDown: told, Exception: told}
        return Starlette(routes=routes, lifespan=self._life, exception_handlers=handlers, middleware=middleware)

    async def drain(self, seconds: float) -> None:
        """Nothing new begins; viewers and those that wait for a clip are told."""
        self.clips.draining = True
        await self.viewers.drain(seconds)

    def watch(self) -> Starlette:
        """What operators reach, on a port of its own."""
        routes = [Route("/health", self._health), Route("/ready", self._ready), Route("/metrics", self._metrics)]
        return Starlette(routes=routes)

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.supervisor.begin()
        self.clips.begin()
        sweeping = asyncio.create_task(self.snapshots.sweeping())
        try:
            yield
        finally:
            sweeping.cancel()
            await self.clips.end()
            await self.supervisor.end()
            self.jobs.close()

    def _guarded(
        self, answer: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Only for holders of a key, where there are keys."""

        async def guarded(request: Request) -> Response:
            holder = self.door.enter(request.headers.get("authorization"))
            if holder is None:
                raise ApiError(401, "a key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")
            if not origin_allowed(request.headers, self.origins):
                raise ApiError(403, "pages of this origin may not use this server; start it with --origin")
            return await answer(request, holder)

        return guarded

    async def _models(self, _: Request, holder: str) -> Response:
        data = [self._described(facts) for facts in self.supervisor.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request, holder: str) -> Response:
        facts = self.supervisor.models.get(request.path_params["name"])
        if facts is None:
            message = f"this server has no such model; it has {', '.join(self.supervisor.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._described(facts))

    def _described(self, facts: Facts) -> dict[str, Any]:
        return {"id": facts.name, "object": "model", "created": int(self.began), "owned_by": "fewstep", **asdict(facts)}

    async def _ticket(self, _: Request, holder: str) -> Response:
        return JSONResponse({"ticket": self.door.ticket(holder)})

    async def _snapshot(self, request: Request, holder: str) -> Response:
        path = self.snapshots.path(request.path_params["name"], holder)
        if path is None:
            raise ApiError(404, "there is no such snapshot of yours any more", code="no_snapshot")
        return FileResponse(self.snapshots.folder / path, filename="stream.safetensors")

    async def _health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, _: Request) -> Response:
        ready = self.supervisor.ready and not self.supervisor.failure and not self.viewers.draining
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def _metrics(self, _: Request) -> Response:
        metrics = self.metrics
        metrics.streams.set(self.viewers.streams)
        metrics.waiting.set(self.viewers.waiting)
        with contextlib.suppress(TableDown):
            metrics.clips_waiting.set(self.jobs.waiting())
        metrics.load.set(self.viewers.load)
        metrics.deaths.set(self.supervisor.deaths)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")
