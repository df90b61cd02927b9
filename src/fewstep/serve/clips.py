"""Makes the clips of jobs, one after the other, and keeps their files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from fewstep.core.atomic import replacing
from fewstep.data.video import write_pixels
from fewstep.serve.database import TableDown
from fewstep.serve.jobs import TRIES, Job, Jobs
from fewstep.serve.metrics import Metrics
from fewstep.serve.orders import Close, Failed, Made, Make, News, Pixels, Progress
from fewstep.serve.supervisor import Supervisor

SWEEP = 30.0
"""Seconds between two looks for jobs whose time is over."""
AGAIN = 5.0
"""Seconds until a change of the table that failed is tried again."""
BEAT = 2.0
"""Seconds between two signs, in the table, that a clip is still made. Who deletes it elsewhere is heard then."""
LOOK = 1.0
"""Seconds until a server that has nothing to make looks for jobs that other servers accepted, or have left."""
log = logging.getLogger(__name__)
T = TypeVar("T")


class Clips:
    """Takes jobs from the table, orders their clips, and writes them."""

    def __init__(
        self, jobs: Jobs, folder: Path, supervisor: Supervisor, metrics: Metrics, *, shared: bool = False
    ) -> None:
        """`folder` is for files of clips alone: others in it are deleted. `shared`: other servers make jobs of this table."""
        self._shared = shared
        self._jobs, self._folder, self._supervisor, self._metrics = jobs, folder, supervisor, metrics
        self._tasks = list[asyncio.Task[None]]()
        self._more = asyncio.Event()
        self._making: Job | None = None
        self._news = asyncio.Queue[News | None]()  # of the clip that is being made; None: it is cancelled
        self._done = 0.0
        self.draining = False
        """Whether the server ends, so that nothing new begins."""
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Go on with what is in the table."""
        self._jobs.recover(lapsed=self._shared)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work()) for work in (self._run, self._beating, self._sweeping)]

    async def end(self) -> None:
        """What is being made waits for the next server."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._making is not None:
            self._supervisor.order(Close(id=self._making.id))
            with contextlib.suppress(TableDown):  # then others make it when its lease is over
                self._jobs.put_back(self._making, counts=False)
            self._making = None

    def wake(self) -> None:
        """There is a new job."""
        self._more.set()

    def cancel(self, job: Job) -> None:
        """Remove a job and its files, whatever its state."""
        self._jobs.remove(job)
        self._delete(job.id)
        self._give_up(job)

    def _give_up(self, job: Job) -> None:
        """It is no longer this server's to make."""
        if self._making is not None and self._making.id == job.id:
            self._supervisor.order(Close(id=job.id))
            self._news.put_nowait(None)

    def progress(self, job: Job) -> int:
        """Percent."""
        if job.state == "completed":
            return 100
        making = self._making is not None and self._making.id == job.id
        return min(99, int(100 * (self._done if making else job.done))) if job.state == "in_progress" else 0

    def video(self, job: Job) -> Path:
        return self._folder / f"{job.id}.mp4"

    def thumbnail(self, job: Job) -> Path:
        return self._folder / f"{job.id}.webp"

    async def _run(self) -> None:
        while True:
            try:
                await self._supervisor.until_ready()
            except ValueError:  # there will be no worker; the server says so
                return
            self._more.clear()
            job = await self._noted(self._next)
            if job is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._more.wait(), LOOK if self._shared else None)
                continue
            if await self._noted(lambda job=job: self._jobs.begin(job)):  # type: ignore[misc]
                self._making, self._done, self._news = job, 0.0, asyncio.Queue()
                await self._to_its_end(job)
                self._making = None

    async def _to_its_end(self, job: Job) -> None:
        try:
            await self._make(job)
        except Exception as error:
            await self._leave(job)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                await self._failed(job, "no_space", "the server's disk is full; try again later")
            else:
                log.exception("a job failed")
                await self._failed(job, "internal_error", "the server failed; its log says why")

    def _next(self) -> Job | None:
        """The oldest job; where others are who make jobs, the oldest that this server has the model of."""
        if not self._shared:
            return self._jobs.next()
        self._jobs.recover(lapsed=True)
        return self._jobs.next(self._supervisor.models)

    async def _make(self, job: Job) -> None:
        wish, png = job.wish, self._jobs.picture(job)
        if wish.model not in self._supervisor.models:
            await self._failed(job, "no_model", f"this server has {wish.model} no more")
            return
        order = Make(
            id=job.id, model=wish.model, prompt=wish.prompt, frames=wish.frames, seed=wish.seed, steps=wish.steps,
            guidance=wish.guidance, negative_prompt=wish.negative_prompt, schedule=wish.schedule,
            image=None if png is None else self._picture(job),
        )  # fmt: skip
        if png is not None:
            await asyncio.to_thread(self._picture(job).write_bytes, png)
        self._supervisor.order(order, self._news.put_nowait)
        await self._heard(job)

    async def _heard(self, job: Job) -> None:
        """Follow what the worker says of it, to its end."""
        while (news := await self._news.get()) is not None:
            match news:
                case Progress():
                    self._done = news.done / news.of
                case Made():
                    await self._keep(job, news.frames)
                    return
                case Failed(code="worker_lost") if job.begun + 1 < TRIES:
                    await self._noted(lambda: self._jobs.put_back(job, counts=True))
                    return
                case Failed():
                    await self._failed(job, news.code, news.message)
                    return
        await self._leave(job)

    async def _keep(self, job: Job, frames: Pixels) -> None:
        await asyncio.to_thread(self._write, job, frames)
        self._picture(job).unlink(missing_ok=True)
        if not await self._noted(lambda: self._jobs.complete(job)):
            await self._leave(job)
            return
        self._metrics.clips.labels("completed").inc()
        self._metrics.clip_seconds.observe(max(0.0, time.time() - job.created))

    async def _leave(self, job: Job) -> None:
        """Delete its files, if it was removed or is still this server's; else they are of another one, which makes it."""
        mine = await self._noted(lambda: self._jobs.renew(job, self._done))
        if mine or await self._noted(lambda: self._jobs.get(job.id)) is None:
            self._delete(job.id)

    def _picture(self, job: Job) -> Path:
        return self._folder / f"{job.id}.png"

    def _write(self, job: Job, frames: Pixels) -> None:
        write_pixels(self.video(job), torch.from_numpy(frames), fps=job.wish.fps)
        with replacing(self.thumbnail(job)) as draft:
            Image.fromarray(frames[len(frames) // 2]).save(draft, "webp")

    async def _failed(self, job: Job, code: str, message: str) -> None:
        self._picture(job).unlink(missing_ok=True)
        self._metrics.clips.labels("failed").inc()
        await self._noted(lambda: self._jobs.fail(job, code, message))

    def _delete(self, id: str) -> None:
        for path in self._folder.glob(f"*{id}*"):  # a draft of it, too
            path.unlink(missing_ok=True)

    async def _noted(self, change: Callable[[], T]) -> T:
        """A change of the table; while the disk is full, it waits, and with it all that follows."""
        while True:
            try:
                return change()
            except TableDown as error:
                log.error("the table of jobs cannot be changed (%s); it is tried again", error)
                await asyncio.sleep(AGAIN)

    async def _beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            if (job := self._making) is None:
                continue
            try:
                if not self._jobs.renew(job, self._done):
                    self._give_up(job)
            except TableDown as error:
                log.error("the table of jobs cannot be changed (%s); others may make what this server makes", error)

    async def _sweeping(self) -> None:
        while True:
            with contextlib.suppress(TableDown, OSError):
                self.sweep()
            await asyncio.sleep(SWEEP)

    def sweep(self) -> None:
        """Delete jobs whose time is over, and files of no job."""
        paths = list(self._folder.iterdir())  # first: a job that is accepted meanwhile is not among the ids
        self._jobs.expire()
        self._jobs.recover(lapsed=True)
        ids = self._jobs.ids()
        for path in paths:
            if path.name.strip(".").partition(".")[0] not in ids:
                path.unlink(missing_ok=True)
