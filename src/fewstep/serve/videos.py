"""`/v1/videos`: clips as jobs, in the shape of OpenAI's API."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fewstep.serve.clips import Clips
from fewstep.serve.database import TableFull
from fewstep.serve.errors import ApiError
from fewstep.serve.jobs import Job, Jobs, KeyReused
from fewstep.serve.limits import Limits
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import Facts
from fewstep.serve.supervisor import Supervisor
from fewstep.serve.uploads import fields_of, picture_of
from fewstep.serve.wishes import asked_of, wish_of

Answer = Callable[[Request, str], Awaitable[Response]]
Guard = Callable[[Answer], Callable[[Request], Awaitable[Response]]]
LONGEST_KEY = 200
"""Characters of an idempotency key."""
LOOK = 0.1
"""Seconds between two looks at a job that somebody waits for."""


@dataclass
class Videos:
    """The endpoints. A job of another holder is not there."""

    jobs: Jobs
    clips: Clips
    supervisor: Supervisor
    limits: Limits
    folder: Path
    metrics: Metrics
    _decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    def routes(self, guarded: Guard) -> list[Route]:
        one = "/v1/videos/{id}"
        return [
            Route("/v1/videos", guarded(self._list)),
            Route("/v1/videos", guarded(self._create), methods=["POST"]),
            Route("/v1/videos/sync", guarded(self._wait), methods=["POST"]),
            Route(one, guarded(self._retrieve)),
            Route(one, guarded(self._delete), methods=["DELETE"]),
            Route(f"{one}/content", guarded(self._content)),
        ]

    async def _create(self, request: Request, holder: str) -> Response:
        return JSONResponse(self.told(await self._accepted(request, holder)))

    async def _wait(self, request: Request, holder: str) -> Response:
        """The video itself. A client that goes away cancels it."""
        job = await self._accepted(request, holder)
        while (now := self.jobs.get(job.id)) is not None and now.ended is None:
            if self.clips.draining:
                message = f"the server is being started again; ask for /v1/videos/{job.id} in a moment"
                raise ApiError(503, message, code="not_ready", headers={"Retry-After": "30"})
            if await request.is_disconnected():
                self.clips.cancel(job)
            await asyncio.sleep(LOOK)
        if now is None:
            raise ApiError(404, "the video was deleted", code="not_found")
        if now.state == "failed":
            raise ApiError(400 if now.code == "invalid_request" else 500, now.message, code=now.code)
        return FileResponse(self.clips.video(now), media_type="video/mp4", headers={"X-Video-Id": now.id})

    async def _list(self, request: Request, holder: str) -> Response:
        asked = request.query_params
        limit, order = asked.get("limit", "20"), asked.get("order", "desc")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= 100):
            raise ApiError(400, "limit is a number from 1 to 100", param="limit", code="invalid_value")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order is asc or desc", param="order", code="invalid_value")
        after = self.jobs.get(asked["after"], holder) if asked.get("after") else None
        if asked.get("after") and after is None:
            raise ApiError(
                400, "after is the id of a video of yours, and this one is none", param="after", code="invalid_value"
            )
        jobs, more = self.jobs.page(holder, after=after, limit=int(limit), newest=order == "desc")
        ends = {"first_id": jobs[0].id if jobs else None, "last_id": jobs[-1].id if jobs else None}
        return JSONResponse({"object": "list", "data": [self.told(job) for job in jobs], "has_more": more, **ends})

    async def _retrieve(self, request: Request, holder: str) -> Response:
        return JSONResponse(self.told(self._found(request, holder)))

    async def _delete(self, request: Request, holder: str) -> Response:
        job = self._found(request, holder)
        self.clips.cancel(job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def _content(self, request: Request, holder: str) -> Response:
        job, variant = self._found(request, holder), request.query_params.get("variant", "video")
        paths = {"video": (self.clips.video, "video/mp4"), "thumbnail": (self.clips.thumbnail, "image/webp")}
        if variant not in paths:
            raise ApiError(400, "variant is video or thumbnail", param="variant", code="invalid_value")
        if job.state != "completed":
            why = job.message or "wait until its status is completed"
            raise ApiError(400, f"this video is {job.state}: {why}", code=job.code or "not_completed")
        place, kind = paths[variant]
        if not place(job).is_file():
            raise ApiError(404, "the file of this video is gone", code="not_found")
        return FileResponse(place(job), media_type=kind, filename=place(job).name)

    def _found(self, request: Request, holder: str) -> Job:
        job = self.jobs.get(request.path_params["id"], holder)
        if job is None:
            raise ApiError(
                404, "there is no such video of yours; it may have been deleted, or its time is over", code="not_found"
            )
        return job

    async def _accepted(self, request: Request, holder: str) -> Job:
        """The job that a request makes, or that it made before. `ApiError` says why not."""
        try:
            return await self._asked(request, holder)
        except ApiError as error:
            self.metrics.refused.labels(error.code).inc()
            raise

    async def _asked(self, request: Request, holder: str) -> Job:
        if self.clips.draining or not self.supervisor.models:
            headers = {"Retry-After": "10"}
            raise ApiError(503, "the server is not ready; try again in a moment", code="not_ready", headers=headers)
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            raise ApiError(400, f"an Idempotency-Key has 1 to {LONGEST_KEY} characters", code="invalid_value")
        given, data = await fields_of(request, self.limits)
        asked = asked_of(given)
        facts = self._model(asked.model)
        png = None
        if data is not None:
            async with self._decoding:  # one at a time: a large picture takes much memory
                png = await asyncio.to_thread(picture_of, data, facts, self.limits)
        wish = wish_of(asked, facts, self.limits, picture=png is not None)
        try:
            if (known := self.jobs.known(holder, wish, picture=png, key=key)) is not None:
                return known
            self._require_room(holder)
            job = self.jobs.add(holder, wish, picture=png, key=key)
        except KeyReused as error:
            raise ApiError(422, str(error), code="idempotency_key_reused") from None
        except TableFull:
            raise _no_space() from None
        self.clips.wake()
        return job

    def _model(self, name: str | None) -> Facts:
        models = self.supervisor.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            message = f"this server has no model {name[:80]!r}; it has {', '.join(models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    def _require_room(self, holder: str) -> None:
        if self.jobs.unfinished(holder) >= self.limits.jobs:
            message = f"you have {self.limits.jobs} videos that are not finished; wait for one of them, or delete it"
            raise ApiError(429, message, code="too_many_jobs", headers={"Retry-After": "10"})
        if shutil.disk_usage(self.folder).free < self.limits.free:
            raise _no_space()

    def told(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        wish = job.wish
        error = {"code": job.code, "message": job.message} if job.state == "failed" else None
        return {
            "id": job.id, "object": "video", "model": wish.model, "status": job.state, "progress": self.clips.progress(job),
            "created_at": int(job.created), "completed_at": int(job.ended) if job.ended and not error else None,
            "expires_at": int(job.expires) if job.expires else None, "error": error, "prompt": wish.prompt,
            "seconds": f"{wish.seconds:.8g}", "size": f"{wish.width}x{wish.height}", "remixed_from_video_id": None,
            "num_frames": wish.frames, "fps": wish.fps, "seed": wish.seed, "num_inference_steps": wish.steps,
            "queue_position": self.jobs.waiting(job) + 1 if job.state == "queued" else None,
        }  # fmt: skip


def _no_space() -> ApiError:
    return ApiError(507, "the server's disk is full; try again later", code="no_space")
