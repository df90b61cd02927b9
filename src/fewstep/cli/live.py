"""`fewstep stream`: one video, written chunk by chunk while it is made."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.cli.clips import SHOWN
from fewstep.cli.command import UsageError
from fewstep.cli.commands import _made, _prompts
from fewstep.cli.keys import read_keys
from fewstep.cli.pace import telling
from fewstep.cli.plan import size
from fewstep.cli.running import runtime_of
from fewstep.cli.screen import screen, table
from fewstep.core.atomic import require_writable
from fewstep.core.stopping import saying
from fewstep.data.growing import GrowingVideo
from fewstep.data.video import LARGEST_SIDE, decode, fit, read_image, to_floats, write_video
from fewstep.engine.log import figure
from fewstep.evaluate.latency import memory_in_use
from fewstep.evaluate.machine import versions
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.encoding import encode_stream
from fewstep.models.needs import remembered
from fewstep.models.runtime import effective, told
from fewstep.models.sampling import Request
from fewstep.models.source import outline
from fewstep.streaming import LiveChunk, Video

if TYPE_CHECKING:
    from fewstep.cli.streams import Stream
    from fewstep.models.card import Card

_KEPT = (
    "student", "seconds", "switch", "keys", "image", "video", "strength", "num_inference_steps", "lora", "scale", "force",
    "dtype", "tiling", "attention",
)  # fmt: skip
"""Options that decide what is made, besides prompts and seed."""


@dataclass(frozen=True)
class Length:
    """The chunks that a video takes."""

    frames: int
    chunks: tuple[int, ...]
    """Frames of each chunk; the last one may have more than the video needs, which are not written."""

    @classmethod
    def of(cls, seconds: float, card: Card) -> Length:
        """UsageError for a model of whole clips, and for a length that is no whole number of frames."""
        chunking = card.contract.stream
        if chunking is None:
            raise UsageError(
                f"{card.name!r} makes whole clips; use fewstep sample, or train a student that streams (docs/streaming.md)"
            )
        exact = seconds * card.fps
        frames = round(exact)
        if frames < 1 or abs(exact - frames) > 1e-6 * frames:
            near = sorted({max(1, math.floor(exact)), max(1, math.ceil(exact))})
            raise UsageError(
                f"--seconds {seconds:g}: a video of {card.fps:g} frames per second has a whole number of them, 1 at least; give "
                f"{' or '.join(f'{n / card.fps:.8g}' for n in near)}"
            )
        model, latents, ends = outline(card), 0, [0]
        while ends[-1] < frames:
            latents += chunking.length(len(ends) - 1)
            ends.append(model.clip_frames(latents))
        return cls(frames, tuple(b - a for a, b in zip(ends, ends[1:])))

    def require(self, at: Sequence[tuple[float, str]], card: Card) -> None:
        """UsageError for a prompt for which no chunk is left."""
        start = sum(self.chunks[:-1]) / card.fps
        for seconds, prompt in at:
            if not 0 <= seconds <= start + 1e-6:
                raise UsageError(
                    f"--at {seconds:g} {prompt!r}: the last chunk of this video starts at {start:.8g} s; give a time from 0 to "
                    "that, or more --seconds"
                )


@dataclass
class Clock:
    """How fast chunks come."""

    began: float
    device: torch.device
    arrivals: list[tuple[float, LiveChunk]] = field(default_factory=list)

    def shown(self, chunk: LiveChunk) -> None:
        self.arrivals.append((perf_counter(), replace(chunk, frames=chunk.frames[:, :, :0, :0])))  # without its pixels

    def said(self) -> str:
        """Time to the first frame, what a chunk takes, memory."""
        first = next((moment for moment, chunk in self.arrivals if chunk.frames.shape[1]), self.began) - self.began
        took = [chunk.took for _, chunk in self.arrivals[1:] or self.arrivals]
        split = ", ".join(
            f"{name} {median(getattr(t, name) for t in took):.0f}" for name in ("denoise", "commit", "decode")
        )
        memory = size(memory_in_use(self.device))
        return f"first frame after {first:.2f} s, a chunk in ms: {split}, memory {memory}"

    def speed(self) -> str:
        """Frames per second, from the first chunk to the last, without the first."""
        (begin, _), (end, _) = self.arrivals[0], self.arrivals[-1]
        frames = sum(chunk.frames.shape[1] for _, chunk in self.arrivals[1:])
        return f"{figure(frames / (end - begin))} frames per second" if frames else "one chunk"


def stream(options: Stream) -> int:
    _check(options)
    card = read_card(options.student)
    length, scale = Length.of(options.seconds, card), _scale(options, card)
    length.require(options.at, card)
    keys = read_keys(options.keys, card) if options.keys else None
    times = Request(prompts=(), num_inference_steps=options.num_inference_steps, force=options.force).times(card)
    if options.dry_run:
        return _planned(options, card, length, len(times) - 1)
    for path in filter(None, (options.output, options.preview)):
        require_writable(path)
    runtime = runtime_of(options, options.student, card=card)
    model = VideoModel.load(card, options.student, trust=options.trust, runtime=runtime)
    for lora in options.lora:
        model = model.with_lora(lora)
    clock = Clock(perf_counter(), model.device)
    asked: dict[str, Any] = {
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "force": options.force,
    }
    video, image = _video(options, model, length, times), _image(options, card)
    with model.stream([options.prompt], video=video, image=image, **asked) as live:
        changes = [(seconds, live.prompt(text, at=seconds, how=options.switch), text) for seconds, text in options.at]
        if keys is not None:
            live.control("keys", keys)
        note = _note(options, model, times, changes)
        file = GrowingVideo(options.output, fps=card.fps, scale=scale, note=note)
        with saying(lambda: _kept(options.output, file, card)), file, telling(options.quiet) as tell:
            for chunk in live.frames(len(length.chunks), last=True):
                clock.shown(chunk)
                file.add(chunk.frames[0, : length.frames - file.frames])
                if options.preview is not None and chunk.frames.shape[1]:
                    write_video(options.preview, to_floats(chunk.frames[0, -1:]), scale=scale)
                tell(str(options.output), file.frames, length.frames, clock.said())
    print(told(effective(model)), file=sys.stderr)
    print(f"{file.frames} frames, {clock.speed()}, {clock.said()}", file=sys.stderr)
    return _made(options.output)


def _check(options: Stream) -> None:
    """UsageError for what no model can do."""
    _prompts((options.prompt, *(text for _, text in options.at)), None)
    if options.video is not None and options.image is not None:
        raise UsageError("a video begins with --image or changes --video; leave out one")
    if options.video is None and options.strength is not None:
        raise UsageError("--strength is that of the change of a --video; give one, or leave --strength out")
    if not math.isfinite(options.seconds):
        raise UsageError(f"--seconds must be a number, got {options.seconds}")
    for name, suffix in (("output", ".mp4"), ("preview", ".png")):
        path = getattr(options, name)
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError(f"--{name} {path}: choose a name that ends in {suffix}")
    for name in ("num_inference_steps", "scale"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _image(options: Stream, card: Card) -> Tensor | None:
    """The picture to begin with, as large as the video."""
    return None if options.image is None else read_image(options.image, (card.height, card.width))


def _video(options: Stream, model: VideoModel, length: Length, times: Sequence[float]) -> Video | None:
    """The video to change, encoded as the stream comes to it. ValueError for one that is too short, before anything is made."""
    if options.video is None:
        return None
    source, chunking, size = options.video, model.card.contract.stream, (model.card.height, model.card.width)
    assert chunking is not None
    needed = sum(length.chunks)
    if (there := sum(1 for _ in decode(source, needed))) < needed:
        raise UsageError(
            f"--video {source}: it has {there} frames, and the chunks of this stream {needed}; give fewer --seconds than "
            f"{there / model.card.fps:.8g}"
        )
    frames = (to_floats(fit(frame, size)[None])[None].to(model.device) for frame in decode(source, needed))
    encoded = enumerate(encode_stream(model.codec, frames, map(chunking.length, range(len(length.chunks)))))
    latest = next(encoded)

    def latents(index: int) -> Tensor:
        nonlocal latest
        while latest[0] < index:
            latest = next(encoded)
        return latest[1]

    found = Video(latents, times[min(1, len(times) - 2)] if options.strength is None else options.strength)
    found.begins(tuple(times))
    return found


def _scale(options: Stream, card: Card) -> int:
    """Factor by which pixels are enlarged. UsageError for a video too large for players."""
    scale = max(1, SHOWN // min(card.height, card.width)) if options.scale is None else options.scale
    if max(card.height, card.width) * scale > LARGEST_SIDE:
        raise UsageError(f"--scale {scale}: {scale * max(card.height, card.width)} pixels are more than {LARGEST_SIDE}")
    return scale


def _note(options: Stream, model: VideoModel, times: Sequence[float], changes: Sequence[tuple[float, int, str]]) -> str:
    """How the file is made, as JSON."""
    default = {field.name: field.default for field in fields(options)}
    given = {name: getattr(options, name) for name in _KEPT if getattr(options, name) != default[name]}
    made = {
        "made by": "fewstep stream", "options": given, "prompts": [options.prompt], "seeds": [options.seed],
        "changes": [{"at": at, "chunk": chunk, "prompt": prompt} for at, chunk, prompt in changes],
        "model": model.card.name, "denoiser": model.fingerprint("denoiser"), "arithmetic": model.runtime.dtype,
        "device": str(model.device), "times": times, "versions": versions(),
    }  # fmt: skip
    return json.dumps(made, default=str)


def _kept(path: Path, file: GrowingVideo, card: Card) -> str:
    return f"{path} can be played and has {file.frames} frames ({file.frames / card.fps:.8g} s)"


def _planned(options: Stream, card: Card, length: Length, steps: int) -> int:
    """`--dry-run`: the chunks, and the memory of the stream."""
    out, chunking = screen(), card.contract.stream
    assert chunking is not None
    runtime = runtime_of(options, options.student, device=options.device, card=card)
    each, calls = remembered(card, runtime), 2 if card.contract.guidance.active else 1
    latents = [chunking.length(i) for i in range(len(length.chunks))]
    held = min(sum(latents), chunking.window - max(chunking.chunks)) if chunking.window else sum(latents)
    limit = "" if chunking.window else ": all, without a window"
    rows = [
        ("length", f"{length.frames} frames of {card.height} x {card.width}, {length.frames / card.fps:.8g} s"),
        ("chunks", f"{len(latents)} of {_different(length.chunks)} frames, {_different(latents)} latent frames"),
        ("frames left out of the last chunk", str(sum(length.chunks) - length.frames)),
        ("network calls of a chunk", str(calls * steps)),
        ("network calls to remember it", str(0 if chunking.commit == "last" else calls)),
        ("memory of a latent frame", size(each)),
        ("memory of the stream", f"{size(held * each)}, {held} latent frames{limit}"),
    ]  # fmt: skip
    out.print(table((f"{card.name}, {runtime.dtype} on {options.device}", ""), rows))
    out.print("dry run: nothing was loaded or written")
    return 0


def _different(counts: Sequence[int]) -> str:
    return ", then ".join(map(str, dict.fromkeys(counts)))
