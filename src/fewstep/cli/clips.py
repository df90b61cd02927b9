"""`fewstep sample`: a few clips side by side in one file, or one file per clip, written as soon as they are done."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.attention import NAG
from fewstep.cli.command import UsageError
from fewstep.cli.commands import _made, _prompts
from fewstep.cli.pace import Tell, telling
from fewstep.cli.presets import card_of
from fewstep.cli.remade import making, note_of, remade, scalars_of, warn_of_others
from fewstep.cli.running import runtime_of, show
from fewstep.core.atomic import require_writable
from fewstep.core.build import At
from fewstep.core.stopping import saying
from fewstep.data.text_folder import TextFolder, filled
from fewstep.data.video import FORMATS, LARGEST_SIDE, read_image, read_video, to_floats, write_video
from fewstep.diffusion import Step
from fewstep.models.bundle import VideoModel, read_card
from fewstep.models.fitting import Memory, fitting
from fewstep.models.needs import Encoder, Plan
from fewstep.models.networks import network_class
from fewstep.models.runtime import Runtime, effective, told
from fewstep.models.sampling import Lead, Request, require_nag
from fewstep.models.videos import video_of
from fewstep.streaming import Video

if TYPE_CHECKING:
    from fewstep.cli.generation import Sample
    from fewstep.models.card import Card

TOGETHER = 8
"""Clips that are made at once (unless `--batch` says otherwise), and largest number side by side in one file."""
GRID = 64
"""Largest number of clips in one file if each prompt is sampled with several seeds."""
SHOWN = 128
"""Shorter side, in pixels, to which smaller clips are enlarged."""


@dataclass(frozen=True)
class Wanted:
    """The clips that a command asks for: every prompt, with every seed if there are several."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, options: Sample, null: str = "") -> Wanted:
        """Where a video is given, there may be no prompt; then it is `null`."""
        unsaid = options.video is not None and not options.prompt and options.prompt_file is None
        prompts = (null,) if unsaid else _prompts(options.prompt, options.prompt_file)
        seeds = options.seed
        if len(seeds) == 1:
            return cls(prompts, tuple(range(seeds[0], seeds[0] + len(prompts))))
        return cls(tuple(p for p in prompts for _ in seeds), seeds * len(prompts))

    def __len__(self) -> int:
        return len(self.prompts)


def sample(options: Sample) -> int:
    options = remade(options) if options.like else options
    if not options.student:
        raise UsageError("name a model, such as world, or a file to make again: --like FILE")
    card = card_of(options.student, options.preset)
    wanted, columns = Wanted.of(options, card.negative_prompt), len(options.seed) if len(options.seed) > 1 else 0
    _check(options, len(wanted) // max(1, columns))
    card = _sized(card, options)
    if options.dry_run:
        plan: Plan = {**_plan(options, card, wanted), "clips": min(options.batch or TOGETHER, len(wanted))}
        return show(options, _planned(card, options), **plan)
    times = Request(prompts=(), num_inference_steps=options.num_inference_steps, force=options.force).times(card)
    scale = _scale(options, card)
    spans = _spans(len(wanted), columns, card, scale)
    paths = [options.output if len(spans) == 1 else _numbered(options.output, i, len(spans)) for i in range(len(spans))]
    require_writable(paths[-1])
    plan = _plan(options, card, wanted)
    runtime = runtime_of(options, options.student, card=_planned(card, options), **plan)
    model, texts = _loaded(card, options.student, options, wanted, runtime)
    for lora in options.lora:
        model = model.with_lora(lora)
    made = making(options, model, times)
    warn_of_others(options.like, made)
    images, lead = _images(options, card, columns), _lead(options, model, wanted)
    given = {"lead": lead, "texts": texts, "video": _video(options, model, times)}
    done: list[Path] = []

    def kept() -> str:
        return f"{len(done)} of {len(paths)} files are written" + (f", the last one is {done[-1]}" if done else "")

    with saying(kept), telling(options.quiet) as tell:
        waiting, files = list[Tensor](), list(zip(spans, paths, strict=True))
        for first, last in fitting(len(wanted), options.batch, TOGETHER, Memory.of(model.device)):
            mine = {name: stack if len(stack) == 1 else stack[first:last] for name, stack in images.items()}
            some = Wanted(wanted.prompts[first:last], wanted.seeds[first:last])
            clips = _clips(model, some, options, {**mine, **given}, tell)
            waiting += clips.cpu().split(1)
            while files and files[0][0][1] <= last:
                (begin, end), path = files.pop(0)
                note = note_of(made, wanted.prompts[begin:end], wanted.seeds[begin:end])
                frames = {"fps": options.fps or card.fps, "scale": scale, "columns": columns, "note": note}
                done.append(_write(path, torch.cat(waiting[: end - begin]), frames))
                waiting = waiting[end - begin :]
    if options.preset is not None:
        print(f"preset {card.provenance['preset']}", file=sys.stderr)
    print(told(effective(model)), file=sys.stderr)
    for path in done[:-1]:
        _made(path)
    return _made(done[-1])


def _clips(model: VideoModel, wanted: Wanted, options: Sample, more: dict[str, Any], tell: Tell) -> Tensor:
    """Clips made at once, with progress by step; `more` are other fields of the request."""
    steps = model.sampling(
        wanted.prompts, **more, num_inference_steps=options.num_inference_steps, num_frames=options.num_frames,
        guidance_scale=options.guidance_scale, scalars=scalars_of(options), seed=wanted.seeds, force=options.force,
        nag=_nag(options),
    )  # fmt: skip
    for step in steps:
        tell(f"clips with seeds {wanted.seeds[0]} to {wanted.seeds[-1]}", step.index + 1, step.steps, "steps")
        if options.preview is not None:
            _preview(model, step, options.preview)
    with torch.inference_mode():
        return model.decode(step.x)


def _preview(model: VideoModel, step: Step, path: Path) -> None:
    """The middle frame of each clip as the step before the last sees it."""
    x0 = step.prediction.x0[:TOGETHER]
    middle = x0.shape[2] // 2
    with torch.inference_mode():
        write_video(path, model.decode(x0[:, :, middle : middle + 1])[:, :, -1:])


def _loaded(
    card: Card, source: str, options: Sample, wanted: Wanted, runtime: Runtime
) -> tuple[VideoModel, TextFolder | None]:
    """A model and, with `--texts`, the conditions of the prompts; then its text encoder has gone before the others come."""
    if options.texts is None:
        return VideoModel.load(card, source, trust=options.trust, runtime=runtime), None
    device = "cpu" if runtime.offload == "block" else runtime.device
    prompts = (*wanted.prompts, card.negative_prompt)
    texts = filled(options.texts, card, source, prompts, trust=options.trust, device=device)
    rest = replace(card, parts={name: spec for name, spec in card.parts.items() if name != "text"})
    return VideoModel.load(rest, source, trust=options.trust, runtime=runtime), texts


def _plan(options: Sample, card: Card, wanted: Wanted) -> Plan:
    """What a plan of memory must know besides the card."""
    return {"nag": _nag(options), "encoder": _encoder(options, card, wanted)}


def _encoder(options: Sample, card: Card, wanted: Wanted) -> Encoder:
    """Where the text encoder will be."""
    if options.texts is None:
        return "beside"
    known = TextFolder.known(options.texts, card)
    there = known is not None and not known.missing((*wanted.prompts, card.negative_prompt))
    return "absent" if there else "alone"


def _lead(options: Sample, model: VideoModel, wanted: Wanted) -> Lead | None:
    """The model for the first steps, at the student's size and run alike."""
    if options.teacher is None or options.teacher_steps is None:
        return None
    size = {name: getattr(model.card, name) for name in ("num_frames", "height", "width")}
    card = replace(read_card(options.teacher), **size)
    teacher, texts = _loaded(card, options.teacher, options, wanted, model.runtime)
    return Lead(teacher, options.teacher_steps, texts)


def _check(options: Sample, count: int) -> None:
    """UsageError for options that no model can fulfil with so many prompts, before a model is loaded."""
    for name in ("image", "last_image"):
        if len(getattr(options, name)) not in (0, 1, count):
            option = f"--{name}".replace("_", "-")
            raise UsageError(f"{option}: give one picture, or one for each of the {count} prompts")
    if options.output.suffix.lower() not in FORMATS:
        raise UsageError(f"--output {options.output}: choose a name that ends in {', '.join(FORMATS)}")
    if options.preview is not None and options.preview.suffix.lower() != ".png":
        raise UsageError(f"--preview {options.preview}: choose a name that ends in .png")
    if options.video is None and options.strength is not None:
        raise UsageError("--strength is that of the change of a --video; give one, or leave --strength out")
    if (options.teacher is None) != (options.teacher_steps is None):
        raise UsageError(
            "--teacher and --teacher-steps belong together: a model, and how many of the first steps it makes"
        )
    for name in ("num_frames", "num_inference_steps", "scale", "batch", "height", "width", "teacher_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if len(set(options.seed)) < len(options.seed) or not options.seed:
        raise UsageError(f"--seed: give one number, or several different ones, got {list(options.seed)}")
    if options.guidance_scale is not None and not math.isfinite(options.guidance_scale):
        raise UsageError(f"--guidance-scale must be a number, got {options.guidance_scale}")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise UsageError(f"--fps must be above 0 and at most 1000, got {options.fps}")
    scalars_of(options)
    _nag(options)


def _sized(card: Card, options: Sample) -> Card:
    """The card with the options' size and negative prompt. UsageError for what the model was not trained for, unless forced,
    and for a negative prompt that nobody would read."""
    height, width = options.height or card.height, options.width or card.width
    if (height, width) != (card.height, card.width) and card.role == "student" and not options.force:
        raise UsageError(
            f"{card.name!r} was trained for frames of {card.height} x {card.width}; leave --height and --width out, or add "
            "--force"
        )
    changes: dict[str, Any] = {"height": height, "width": width}
    if options.nag_scale is not None:
        require_nag(network_class(card.parts["denoiser"].type, At("card.json", "parts.denoiser.type")))
    if options.negative_prompt is not None:
        guided = card.contract.guidance.active if options.guidance_scale is None else options.guidance_scale != 1
        if not guided and options.nag_scale is None:
            raise UsageError(
                f"--negative-prompt: {card.name!r} is sampled without guidance, so it reads no negative prompt. Leave it out, "
                "or apply guidance on top (--guidance-scale 2 --force), which takes two calls per step, or push the attention to "
                f"the prompt away from it (--nag-scale {NAG().scale:g}), which takes one"
            )
        changes["negative_prompt"] = options.negative_prompt
    return replace(card, **changes)


def _planned(card: Card, options: Sample) -> Card:
    """The card with the options' number of frames and guidance, for a plan of memory."""
    asked = Request(prompts=(), guidance_scale=options.guidance_scale, force=options.force)
    contract = replace(card.contract, guidance=asked.guidance(card))
    return replace(card, num_frames=options.num_frames or card.num_frames, contract=contract)


def _nag(options: Sample) -> NAG | None:
    """UsageError for numbers that NAG does not take, and for some without a scale."""
    given = {name: getattr(options, f"nag_{name}") for name in ("scale", "tau", "alpha")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and "scale" not in given:
        raise UsageError(f"--nag-{next(iter(given))} changes NAG, which is off; give --nag-scale too")
    try:
        return NAG(**given) if given else None
    except ValueError as error:
        raise UsageError(f"--nag-scale, --nag-tau, --nag-alpha: {error}") from None


def _scale(options: Sample, card: Card) -> int:
    """Factor by which pixels are enlarged. UsageError for a video too large for players."""
    scale = max(1, SHOWN // min(card.height, card.width)) if options.scale is None else options.scale
    if max(card.height, card.width) * scale > LARGEST_SIDE:
        raise UsageError(
            f"--scale {scale} enlarges {card.height} x {card.width} pixels to {card.height * scale} x {card.width * scale}, and "
            f"video players allow at most {LARGEST_SIDE} along a side; leave --scale out"
        )
    return scale


def _spans(count: int, columns: int, card: Card, scale: int) -> list[tuple[int, int]]:
    """Which clips share a file: all clips if they are few and fit side by side (a row per prompt), otherwise none."""
    across, rows = columns or count, count // columns if columns else 1
    few = count <= (GRID if columns else TOGETHER)
    if few and across * card.width * scale <= LARGEST_SIDE and rows * card.height * scale <= LARGEST_SIDE:
        return [(0, count)]
    return [(i, i + 1) for i in range(count)]


def _numbered(output: Path, number: int, count: int) -> Path:
    """The file name of clip `number`: `sample-01.mp4` for the first."""
    return output.with_name(f"{output.stem}-{number + 1:0{len(str(count))}d}{output.suffix}")


def _images(options: Sample, card: Card, columns: int) -> dict[str, Tensor]:
    """One picture for all clips, or one for each: every seed of a prompt has the prompt's."""
    pictures: dict[str, Sequence[Path]] = {"image": options.image, "last_image": options.last_image}
    size, found = (card.height, card.width), {}
    for name, paths in pictures.items():
        if paths:
            stack = torch.stack([read_image(path, size) for path in paths])
            found[name] = stack if len(paths) == 1 else stack.repeat_interleave(max(1, columns), 0)
    return found


def _video(options: Sample, model: VideoModel, times: Sequence[float]) -> Video | None:
    """The video to begin with. UsageError for a strength of no use."""
    if options.video is None:
        return None
    card, own = model.card, model.card.contract.grid.video_noise is not None
    if own and options.strength is not None:
        raise UsageError(
            f"--strength {options.strength:g}: {card.name!r} begins with a video at a time of its own, {times[0]:g}; leave it out"
        )
    frames = read_video(options.video, options.num_frames or card.num_frames, size=(card.height, card.width))
    second = 1.0 if own else times[min(1, len(times) - 2)]
    return video_of(model, to_floats(frames)[None], second if options.strength is None else options.strength)


def _write(path: Path, clips: Tensor, options: dict[str, Any]) -> Path:
    """Write clips. If the disk is full or gone, write them to the folder for temporary files; the error names that file."""
    try:
        return write_video(path, clips, **options)
    except OSError as error:
        spare = Path(tempfile.mkdtemp(prefix="fewstep-")) / f"clips{path.suffix}"
        try:
            spare = write_video(spare, clips, **options)
        except OSError:
            raise error from None
        raise OSError(error.errno, f"{error.strerror}. The clips were written to {spare} instead", str(path)) from error
