"""What a worker does: streams and clips, each one network call at a time."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.video import read_image, to_pixels
from fewstep.models import VideoModel
from fewstep.models.runtime import decodes_in_chunks
from fewstep.models.snapshots import load_snapshot, save_snapshot
from fewstep.serve.orders import (
    Applies,
    Finished,
    Made,
    Make,
    News,
    Open,
    Order,
    Pixels,
    Play,
    Played,
    Press,
    Progress,
    Save,
    Saved,
    Shown,
    Steer,
)
from fewstep.serve.pace import Pace
from fewstep.streaming import LiveChunk, LiveSession, LiveSnapshot
from fewstep.streaming.control import held_last, inputs_of, keys_of, row_of
from fewstep.streaming.live import AHEAD

Send = Callable[[News], None]
SOON = 100
"""Chunks from the one that is shown to the last one for which prompts and keys are taken."""


class Task(ABC):
    """A stream or a clip that is being made."""

    shape: Hashable = None
    """Of its last network call, where calls are joined (`streaming.together`)."""

    @property
    def joins(self) -> bool:
        """Whether its next call may be made with one that is due before."""
        return False

    @abstractmethod
    def due(self, now: float) -> float | None:
        """When its next call should be done, on the worker's clock; None: it waits."""

    @abstractmethod
    def work(self, now: Callable[[], float]) -> bool:
        """Make one network call. Whether more follow."""

    def hear(self, order: Order, now: float) -> None:  # noqa: B027 - a clip takes no orders
        """Follow an order."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds."""


class Stream(Task):
    """A stream and its viewer."""

    def __init__(self, order: Open, model: VideoModel, folder: Path, send: Send, now: float) -> None:
        """`folder` has the files of snapshots. ValueError for what the student was not trained for."""
        self._order, self._model, self._folder, self._send = order, model, folder, send
        start: LiveSnapshot | list[str] = [order.prompt]
        options: dict[str, Any] = {"seed": order.seed}
        if order.snapshot is not None:
            start, options = _snapshot(folder / order.snapshot, model), {}
        self._live = model.stream(start, num_inference_steps=order.steps, **options)
        self._keys = keys_of(model.card)
        if order.snapshot is None:
            release(self._live, model)
        self._before = self._live.snapshot().frames  # those that were shown before it begins
        self._until = None if order.chunks is None else self._live.chunks + order.chunks
        longest = max(chunk_frames(model))
        self._pace = Pace(model.card.fps, order.ahead * longest, opened=now, acknowledged=order.acknowledged)
        self._paused_at: float | None = None
        self._steers = set[int]()  # chunks from which prompts change

    @property
    def joins(self) -> bool:
        """Not before a chunk with another prompt: others would wait until it is read."""
        self._steers = {chunk for chunk in self._steers if chunk >= self._live.chunks}
        return not self._steers or min(self._steers) > self._live.chunks + AHEAD

    def due(self, now: float) -> float | None:
        if self._paused_at is not None or self._pace.waits(now):
            return None
        return self._pace.due()

    def work(self, now: Callable[[], float]) -> bool:
        chunk = self._live.work(self._until, last=self._until is not None)
        if chunk is not None:
            self._pace.send(chunk.frames.shape[1], now())
            self._send(_shown(self._order.id, chunk, held_last(self._model.card, chunk.told)))
        if self._live.chunks == self._until:
            self._send(Finished(id=self._order.id))
            return False
        return True

    def hear(self, order: Order, now: float) -> None:
        match order:
            case Steer():
                chunk = self._live.prompt(order.prompt, chunk=self._soon(order.chunk), how=order.how)
                self._steers.add(chunk)
                self._send(Applies(id=order.id, token=order.token, chunk=chunk, prompt=order.prompt))
            case Press():
                row = row_of(order.keys, self._keys)
                chunk = self._live.control("keys", row, chunk=self._soon(order.chunk))
                self._send(Applies(id=order.id, token=order.token, chunk=chunk, keys=order.keys))
            case Play(on=True) if self._paused_at is not None:
                self._pace.pause(now - self._paused_at)
                self._paused_at = None
            case Play(on=False) if self._paused_at is None:
                self._paused_at = now
            case Played():
                self._pace.play(order.frames - self._before, now)
            case Save():
                path = self._folder / f"{secrets.token_urlsafe(18)}.safetensors"
                save_snapshot(self._live.snapshot(), self._model, path)
                self._send(Saved(id=order.id, chunk=self._live.chunks, name=path.name, bytes=path.stat().st_size))

    def _soon(self, chunk: int | None) -> int | None:
        """The chunk of an order. ValueError for one that is far away: nobody may fill the memory with what is to come."""
        if chunk is not None and chunk > self._live.chunks + SOON:
            raise ValueError(
                f"chunk {chunk} is far away; name one of the next {SOON}, up to {self._live.chunks + SOON}"
            )
        return chunk

    def close(self) -> None:
        self._live.close()


class Clip(Task):
    """A clip, made when no viewer of a stream waits; of a student that streams, chunk by chunk."""

    def __init__(self, order: Make, model: VideoModel, folder: Path, send: Send, now: float) -> None:
        """ValueError for what the model cannot make."""
        self._order, self._model, self._send, self._opened = order, model, send, now
        self._calls = self._streamed() if model.card.contract.stream is not None else self._sampled()

    def due(self, now: float) -> float:
        return self._opened + 1e9  # after all viewers, and in order

    def work(self, now: Callable[[], float]) -> bool:
        done = next(self._calls, None)
        if done is None:
            return False
        self._send(Progress(id=self._order.id, done=done[0], of=done[1]))
        return True

    def close(self) -> None:
        self._calls.close()

    def _sampled(self) -> Generator[tuple[int, int]]:
        order, model = self._order, self._model
        if order.negative_prompt is not None:
            model = model.with_card(negative_prompt=order.negative_prompt)
        size = model.card.height, model.card.width
        image = None if order.image is None else read_image(order.image, size)
        steps = model.sampling(
            [order.prompt], image=image, seed=order.seed, num_inference_steps=order.steps, num_frames=order.frames,
            guidance_scale=order.guidance,
        )  # fmt: skip
        step = None
        for step in steps:
            if model.device.type != "cpu":  # else calls would pile up there, before those for viewers
                torch.accelerator.current_stream(model.device).synchronize()
            pieces = step.x.shape[2] if decodes_in_chunks(model) else 1
            yield step.index + 1, step.steps + pieces
        assert step is not None
        parts = list[Pixels]()
        for frames in self._decoded(step.x, pieces):
            parts.append(to_pixels(frames)[0].numpy())
            if len(parts) < pieces:
                yield step.steps + len(parts), step.steps + pieces
        self._made(np.concatenate(parts))

    def _decoded(self, latents: Tensor, pieces: int) -> Iterator[Tensor]:
        """Frames `[1, 3, F, H, W]` of so many pieces, one after the other: between two of them the worker says that it lives, and
        hears whether the clip is still wanted."""
        past = None
        with torch.no_grad():
            if pieces == 1:
                yield self._model.decode(latents)
                return
            for index, piece in enumerate(latents.split(1, 2), 1):
                made = self._model.decode_next(piece, past, last=index == pieces)
                past = made.past
                yield made.frames

    def _streamed(self) -> Generator[tuple[int, int]]:
        order, model = self._order, self._model
        parts = list[Pixels]()
        with model.stream([order.prompt], seed=order.seed, num_inference_steps=order.steps) as live:
            chunks = live.chunk_at(order.frames / model.card.fps)
            for seconds, prompt in order.schedule:
                live.prompt(prompt, at=seconds)
            while live.chunks < chunks:
                if (made := live.work(chunks, last=True)) is not None:
                    parts.append(made.frames[0].numpy())
                yield live.chunks, chunks
        self._made(np.concatenate(parts)[: order.frames])

    def _made(self, frames: Pixels) -> None:
        self._send(Made(id=self._order.id, frames=np.ascontiguousarray(frames), fps=self._model.card.fps))


def chunk_frames(model: VideoModel) -> tuple[int, int]:
    """Frames of the first chunk of a stream, and of later ones."""
    stream = model.card.contract.stream
    assert stream is not None
    first, second = stream.length(0), stream.length(1)
    begin = model.clip_frames(first)
    return begin, model.clip_frames(first + second) - begin


def release(live: LiveSession, model: VideoModel) -> None:
    """Tell a stream that begins of no key, if the model reads keys and does not say what it is told without them."""
    if (keys := keys_of(model.card)) and inputs_of(model.card)["keys"].default is None:
        live.control("keys", [0.0] * len(keys))


def _snapshot(path: Path, model: VideoModel) -> LiveSnapshot:
    """Where another stream was. A ValueError names no path of this machine."""
    try:
        return load_snapshot(path, model)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "the snapshot")) from None


def _shown(name: str, chunk: LiveChunk, keys: tuple[str, ...]) -> Shown:
    took = chunk.took
    return Shown(
        id=name, index=chunk.index, first=chunk.first, seconds=chunk.seconds, prompt=chunk.prompts[0], version=chunk.version,
        frames=chunk.frames[0].numpy(), took=(took.denoise, took.commit, took.decode), keys=keys,
    )  # fmt: skip
