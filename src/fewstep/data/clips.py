"""Decode the clips of many videos ahead, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from fewstep.data.keep import Keep
from fewstep.data.layouts import Item
from fewstep.data.video import Clip, ClipError, Cut, read_clips

K = TypeVar("K")
T = TypeVar("T")

AHEAD_BYTES = 2**30
"""Largest size of decoded frames that wait to be used, per process; at least one clip of each open video may wait."""
DEPTH = 8
"""Largest number of clips of one video that wait."""


def clips_of(item: Item, cut: Cut, keep: Keep) -> Iterator[Clip]:
    """The clips of one video, in order. A clip outside the limits has a `problem`.

    ClipError says why there is no clip, or no further one. Every error while reading becomes a ClipError, because a broken file
    must not stop the others.
    """
    try:
        video = item.video()
        if problem := keep.of_video(video):
            raise ClipError(problem)
        for clip in read_clips(video, cut):
            yield clip if clip.problem else replace(clip, problem=keep.of_clip(clip.frames))
    except ClipError:
        raise
    except Exception as error:
        raise ClipError(f"cannot be read: {type(error).__name__}: {error}") from error


def ahead(
    sources: Iterable[tuple[K, Callable[[], Iterator[T]]]], *, threads: int, window: int, depth: int
) -> Generator[tuple[K, Iterator[T]]]:
    """Every source with its elements, in order. Meanwhile `threads` read the next `window` sources, `depth` elements of each.

    The error of a source is raised in place of its next element. Each source must be read to its end before the next one.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    coming: deque[tuple[K, _Ahead[T]]] = deque()
    try:
        for key, begin in sources:
            coming.append((key, _Ahead(pool, begin(), depth)))
            if len(coming) > window:
                key, elements = coming.popleft()
                yield key, iter(elements)
        while coming:
            key, elements = coming.popleft()
            yield key, iter(elements)
    finally:
        pool.shutdown(cancel_futures=True)


def depth_of(cut: Cut, window: int) -> int:
    """Number of clips that may wait for each of `window` videos."""
    size = 3 * cut.num_frames * cut.height * cut.width
    return min(DEPTH, max(1, AHEAD_BYTES // (size * window)))


class _Ahead(Iterable[T]):
    """One source. A thread of `pool` takes the next elements while the earlier ones are used."""

    def __init__(self, pool: Executor, elements: Iterator[T], depth: int) -> None:
        self._pool, self._elements, self._depth = pool, elements, depth
        self._coming = self._start()

    def __iter__(self) -> Iterator[T]:
        while True:
            taken, error, more = self._coming.result()
            if more:
                self._coming = self._start()
            yield from taken
            if error is not None:
                raise error
            if not more:
                return

    def _start(self) -> Future[tuple[list[T], Exception | None, bool]]:
        return self._pool.submit(self._take)

    def _take(self) -> tuple[list[T], Exception | None, bool]:
        """Some elements, the error after them if there was one, and whether there may be more elements."""
        taken: list[T] = []
        try:
            for element in islice(self._elements, self._depth):
                taken.append(element)
        except Exception as error:
            return taken, error, False
        return taken, None, len(taken) == self._depth
