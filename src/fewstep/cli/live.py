"""`fewstep stream`: one video, written chunk by chunk while it is made."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from fewstep.cli.remade import completed, facts_of, made_by, warn_of_others
from fewstep.cli.running import runtime_of
from fewstep.cli.screen import screen, table
from fewstep.core.atomic import require_writable
from fewstep.core.stopping import saying
from fewstep.data.growing import GrowingVideo
from fewstep.data.video import LARGEST_SIDE, decode, fit, read_image, to_floats, write_video
from fewstep.engine.log import figure
from fewstep.evaluate.latency import memory_in_use
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.encoding import encode_stream
from fewstep.models.needs import remembered
from fewstep.models.runtime import effective, told
from fewstep.models.sampling import Request
from fewstep.models.snapshots import load_snapshot, save_snapshot
from fewstep.models.source import outline
from fewstep.streaming import LiveChunk, LiveSession, LiveSnapshot, Snapshot, Video, cascaded

if TYPE_CHECKING:
    from fewstep.cli.streams import Stream
    from fewstep.models.card import Card

_KEPT = (
    "student", "seconds", "switch", "keys", "image", "video", "strength", "num_inference_steps", "cascade", "lora", "scale",
    "force", "dtype", "tiling", "attention",
)  # fmt: skip
"""Options that decide what is made, besides prompts and seed."""


@dataclass(frozen=True)
class Length:
    """The chunks that a video takes."""

    frames: int
    chunks: tuple[int, ...]
    """Frames of each chunk; the last one may have more than the video needs, which are not written."""

    @classmethod
    def of(cls, seconds: float, card: Card, after: int = 0) -> Length:
        """Those that follow the first `after` chunks. UsageError for a model of whole clips, and for a length that is no whole
        number of frames."""
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
        model, latents = outline(card), chunking.begin(after)
        ends = [model.clip_frames(latents) if latents else 0]
        while ends[-1] - ends[0] < frames:
            latents += chunking.length(after + len(ends) - 1)
            ends.append(model.clip_frames(latents))
        return cls(frames, tuple(b - a for a, b in zip(ends, ends[1:])))

    @property
    def spare(self) -> int:
        """Frames of the last chunk that the video does not need."""
        return sum(self.chunks) - self.frames

    def require_whole(self, card: Card) -> None:
        """UsageError where the last chunk is not written whole, and a stream that goes on would leave frames out."""
        if self.spare:
            fits = (sum(self.chunks[:-1]), sum(self.chunks))
            raise UsageError(
                f"--snapshot: the stream goes on after a whole chunk, and {self.spare} frames of the last one are not in this "
                f"video; give --seconds {' or '.join(f'{n / card.fps:.8g}' for n in fits if n)}"
            )

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
    if options.like is not None:
        options = _like(options, options.like)
    _check(options)
    card = _cascaded(options, read_card(options.student))
    length, scale = Length.of(options.seconds, card), _scale(options, card)
    length.require(options.at, card)
    keys = read_keys(options.keys, card) if options.keys else None
    times = Request(prompts=(), num_inference_steps=options.num_inference_steps, force=options.force).times(card)
    if options.dry_run:
        return _planned(options, card, length, len(times) - 1)
    for path in filter(None, (options.output, options.preview, options.snapshot)):
        require_writable(path)
    runtime = runtime_of(options, options.student, card=card)
    model = VideoModel.load(card, options.student, trust=options.trust, runtime=runtime)
    for lora in options.lora:
        model = model.with_lora(lora)
    start = None if options.restore is None else load_snapshot(options.restore, model)
    if start is not None:
        length = Length.of(options.seconds, card, start.session.chunks)
    if options.snapshot is not None:
        length.require_whole(card)
    clock = Clock(perf_counter(), model.device)
    with _begun(options, model, start, _video(options, model, length, times)) as live:
        ahead = 0.0 if start is None else start.frames / card.fps
        changes = [
            (seconds, live.prompt(text, at=ahead + seconds, how=options.switch), text) for seconds, text in options.at
        ]
        if keys is not None:
            live.control("keys", keys)
        made = _making(options, model, live.snapshot().session, times, changes)
        file = GrowingVideo(options.output, fps=card.fps, scale=scale, note=json.dumps(made, default=str))
        with saying(lambda: _kept(options.output, file, card)), file, telling(options.quiet) as tell:
            for chunk in live.frames(len(length.chunks), last=options.snapshot is None):
                clock.shown(chunk)
                file.add(chunk.frames[0, : length.frames - file.frames])
                if options.preview is not None and chunk.frames.shape[1]:
                    write_video(options.preview, to_floats(chunk.frames[0, -1:]), scale=scale)
                tell(str(options.output), file.frames, length.frames, clock.said())
            if options.snapshot is not None:
                save_snapshot(live.snapshot(), model, options.snapshot)
    warn_of_others(options.like, made)
    print(told(effective(model)), file=sys.stderr)
    print(f"{file.frames} frames, {clock.speed()}, {clock.said()}", file=sys.stderr)
    return _made(options.output)


def _cascaded(options: Stream, card: Card) -> Card:
    """The card, whose chunks start before the one before is finished, if that is asked for."""
    if options.cascade is None:
        return card
    return replace(card, contract=cascaded(card.contract, options.cascade, options.num_inference_steps))


def _begun(options: Stream, model: VideoModel, start: LiveSnapshot | None, video: Video | None) -> LiveSession:
    """The stream, where it begins or goes on."""
    steps, force = options.num_inference_steps, options.force
    if start is None:
        size = model.card.height, model.card.width
        image = None if options.image is None else read_image(options.image, size)
        prompts, seed = [options.prompt or ""], options.seed
        return model.stream(prompts, video=video, image=image, seed=seed, num_inference_steps=steps, force=force)
    live = model.stream(start, video=video, num_inference_steps=steps, force=force)
    if options.prompt:
        live.prompt(options.prompt, how=options.switch)
    return live


def _check(options: Stream) -> None:
    """UsageError for what no model can do."""
    _check_start(options)
    _prompts(tuple(text for text in (options.prompt, *(text for _, text in options.at)) if text is not None), None)
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


def _like(options: Stream, path: Path) -> Stream:
    """The options with what the file says, where the command line does not. UsageError without such a note."""
    facts = facts_of(path, "fewstep stream")
    if facts["after chunks"]:
        raise UsageError(f"--like {path}: it went on after a snapshot; give --restore and the options that made it")
    told: dict[str, Any] = {name: value for name, value in facts["options"].items() if name in _KEPT}
    told |= {"prompt": facts["prompts"][0], "seed": facts["seeds"][0]}
    told["at"] = tuple((change["at"], change["prompt"]) for change in facts["changes"])
    for name, kind in (("video", Path), ("image", Path), ("lora", tuple)):
        if name in told:
            told[name] = kind(told[name])
    return completed(options, told)


def _check_start(options: Stream) -> None:
    """UsageError unless it is clear where the stream begins."""
    if options.restore is None:
        if options.prompt is None:
            raise UsageError("--prompt is missing: say what the video shows, or go on with a stream by --restore")
    elif options.video is not None or options.image is not None or options.dry_run or options.seed:
        raise UsageError(
            "--restore goes on with a stream, its seed and its prompts; leave --video, --seed, --image and --dry-run out"
        )


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


def _making(
    options: Stream,
    model: VideoModel,
    begun: Snapshot,
    times: Sequence[float],
    changes: Sequence[tuple[float, int, str]],
) -> dict[str, Any]:
    """How the file is made."""
    given = {name: getattr(options, name) for name in _KEPT}
    return made_by("fewstep stream", options, given, model, times) | {
        "prompts": list(begun.prompts), "seeds": list(begun.seeds), "after chunks": begun.chunks,
        "changes": [{"at": at, "chunk": chunk, "prompt": prompt} for at, chunk, prompt in changes],
    }  # fmt: skip


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
    at_once = max(chunking.rolling, 1)
    limit = "" if chunking.window else ": all, without a window"
    rows = [
        ("length", f"{length.frames} frames of {card.height} x {card.width}, {length.frames / card.fps:.8g} s"),
        ("chunks", f"{len(latents)} of {_different(length.chunks)} frames, {_different(latents)} latent frames"),
        ("frames left out of the last chunk", str(length.spare)),
        ("chunks denoised at once", str(at_once)),
        ("network calls of a chunk", str(calls * steps // at_once)),
        ("network calls to remember it", str(calls * chunking.commits)),
        ("memory of a latent frame", size(each)),
        ("memory of the stream", f"{size(held * each)}, {held} latent frames{limit}"),
    ]  # fmt: skip
    out.print(table((f"{card.name}, {runtime.dtype} on {options.device}", ""), rows))
    out.print("dry run: nothing was loaded or written")
    return 0


def _different(counts: Sequence[int]) -> str:
    return ", then ".join(map(str, dict.fromkeys(counts)))
