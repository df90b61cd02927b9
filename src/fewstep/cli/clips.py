"""`fewstep sample`: a few clips side by side in one file, or one file per clip, written as soon as they are done."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.cli.command import UsageError
from fewstep.cli.commands import _made, _prompts
from fewstep.cli.running import runtime_of, show
from fewstep.core.atomic import require_writable
from fewstep.core.stopping import saying
from fewstep.data.video import LARGEST_SIDE, read_image, write_video
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.fitting import Memory, fitting
from fewstep.models.runtime import effective, told

if TYPE_CHECKING:
    from fewstep.cli.arguments import Sample
    from fewstep.models.card import Card

TOGETHER = 8
"""Clips that are made at once (unless `--batch` says otherwise), and largest number side by side in one file."""
SHOWN = 128
"""Shorter side, in pixels, to which smaller clips are enlarged."""


def sample(options: Sample) -> int:
    prompts = _prompts(options.prompt, options.prompt_file)
    _check(options, len(prompts))
    scalars = _scalars(options.scalar)
    if options.dry_run:
        at_once = min(options.batch or TOGETHER, len(prompts))
        return show(options, options.student, clips=at_once, num_frames=options.num_frames, memory=options.memory)
    card = read_card(options.student)
    scale = _scale(options, card)
    spans = _spans(len(prompts), card.width * scale)
    paths = [
        options.output if len(spans) == 1 else _numbered(options.output, first, len(prompts)) for first, _ in spans
    ]
    require_writable(paths[-1])
    model = VideoModel.from_pretrained(
        options.student, trust=options.trust, runtime=runtime_of(options, options.student)
    )
    images = _images(options, card)
    done: list[Path] = []

    def kept() -> str:
        return f"{len(done)} of {len(paths)} files are written" + (f", the last one is {done[-1]}" if done else "")

    with saying(kept):
        waiting, files = list[Tensor](), list(zip(spans, paths, strict=True))
        for first, last in fitting(len(prompts), options.batch, TOGETHER, Memory.of(model.device)):
            mine = {name: stack if len(stack) == 1 else stack[first:last] for name, stack in images.items()}
            clips = model(
                prompts[first:last], **mine, num_inference_steps=options.num_inference_steps, num_frames=options.num_frames,
                guidance_scale=options.guidance_scale, scalars=scalars, seed=options.seed + first, force=options.force,
            )  # fmt: skip
            waiting += clips.cpu().split(1)
            while files and files[0][0][1] <= last:
                (begin, end), path = files.pop(0)
                _write(path, torch.cat(waiting[: end - begin]), card.fps, scale)
                waiting = waiting[end - begin :]
                done.append(path)
    print(told(effective(model)), file=sys.stderr)
    for path in done[:-1]:
        _made(path)
    return _made(done[-1])


def _check(options: Sample, count: int) -> None:
    """UsageError for options that no model can fulfil, before a model is loaded."""
    for name in ("image", "last_image"):
        if len(getattr(options, name)) not in (0, 1, count):
            option = f"--{name}".replace("_", "-")
            raise UsageError(f"{option}: give one picture, or one for each of the {count} prompts")
    if options.output.suffix.lower() not in (".mp4", ".gif"):
        raise UsageError(f"--output {options.output}: choose a name that ends in .mp4 or .gif")
    for name in ("num_frames", "num_inference_steps", "scale", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.guidance_scale is not None and not math.isfinite(options.guidance_scale):
        raise UsageError(f"--guidance-scale must be a number, got {options.guidance_scale}")


def _scale(options: Sample, card: Card) -> int:
    """Factor by which pixels are enlarged. UsageError for a video too large for players."""
    scale = max(1, SHOWN // min(card.height, card.width)) if options.scale is None else options.scale
    if max(card.height, card.width) * scale > LARGEST_SIDE:
        raise UsageError(
            f"--scale {scale} enlarges {card.height} x {card.width} pixels to {card.height * scale} x {card.width * scale}, and "
            f"video players allow at most {LARGEST_SIDE} along a side; leave --scale out"
        )
    return scale


def _spans(count: int, width: int) -> list[tuple[int, int]]:
    """Which clips share a file: all clips if they are few and fit side by side, otherwise none."""
    together = count <= TOGETHER and count * width <= LARGEST_SIDE
    return [(0, count)] if together else [(i, i + 1) for i in range(count)]


def _numbered(output: Path, number: int, count: int) -> Path:
    """The file name of clip `number`: `sample-01.mp4` for the first."""
    return output.with_name(f"{output.stem}-{number + 1:0{len(str(count))}d}{output.suffix}")


def _images(options: Sample, card: Card) -> dict[str, Tensor]:
    pictures: dict[str, Sequence[Path]] = {"image": options.image, "last_image": options.last_image}
    size = (card.height, card.width)
    return {name: torch.stack([read_image(p, size) for p in paths]) for name, paths in pictures.items() if paths}


def _scalars(given: Sequence[str]) -> dict[str, float]:
    """The numbers by name. UsageError for a word that is no `name=number`, and for a name that is given twice."""
    found: dict[str, float] = {}
    for word in given:
        name, equals, number = word.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (name and equals and math.isfinite(value)):
            raise UsageError(f"--scalar {word}: write the name and a number, such as guidance=4.0")
        if name in found:
            raise UsageError(f"--scalar: {name} is given twice, as {found[name]:g} and as {value:g}; give it once")
        found[name] = value
    return found


def _write(path: Path, clips: Tensor, fps: float, scale: int) -> None:
    """Write clips. If the disk is full or gone, write them to the folder for temporary files; the error names that file."""
    try:
        write_video(path, clips, fps=fps, scale=scale)
    except OSError as error:
        spare = Path(tempfile.mkdtemp(prefix="fewstep-")) / f"clips{path.suffix}"
        try:
            write_video(spare, clips, fps=fps, scale=scale)
        except OSError:
            raise error from None
        raise OSError(error.errno, f"{error.strerror}. The clips were written to {spare} instead", str(path)) from error
