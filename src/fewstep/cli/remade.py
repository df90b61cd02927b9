"""What a file says of how its clips were made, and `--like FILE` of `sample` and `stream`, which makes them again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fewstep.cli.command import UsageError
from fewstep.data.video import read_note
from fewstep.evaluate.machine import versions
from fewstep.models.bundle import VideoModel

if TYPE_CHECKING:
    from fewstep.cli.generation import Sample

T = TypeVar("T")
_KEPT = (
    "student", "preset", "lora", "teacher", "teacher_steps", "image", "last_image", "video", "strength", "num_inference_steps",
    "guidance_scale", "negative_prompt", "nag_scale", "nag_tau", "nag_alpha", "scalar", "num_frames", "height", "width", "fps",
    "scale", "force", "dtype", "tiling", "attention",
)  # fmt: skip
"""Options that decide what is made, besides prompts and seeds."""


def making(options: Sample, model: VideoModel, times: Sequence[float]) -> dict[str, Any]:
    """What made the clips, and what is needed to make them again besides prompts and seeds. Hashes the denoiser's weights."""
    given = {name: getattr(options, name) for name in _KEPT}
    given["scalar"] = tuple(f"{name}={value:g}" for name, value in sorted(scalars_of(options).items()))
    return made_by("fewstep sample", options, given, model, times)


def made_by(
    command: str, options: Any, given: Mapping[str, Any], model: VideoModel, times: Sequence[float]
) -> dict[str, Any]:
    """What `command` made with its `options`, of which `given` decide what is made."""
    default = _defaults(options)
    changed = {name: value for name, value in given.items() if name == "student" or value != default[name]}
    return {
        "made by": command, "options": changed,
        "model": model.card.name, "denoiser": model.fingerprint("denoiser"), "arithmetic": model.runtime.dtype,
        "device": str(model.device), "times": times,
        "versions": versions(),
    }  # fmt: skip


def note_of(made: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """The note of a file with these clips, as JSON."""
    return json.dumps({**made, "prompts": prompts, "seeds": seeds}, default=str)


def remade(options: Sample) -> Sample:
    """The options with what the file `options.like` says, where the command line does not. UsageError without such a note."""
    facts = facts_of(options.like or Path(), "fewstep sample")
    told: dict[str, Any] = {name: value for name, value in facts["options"].items() if name in _KEPT}
    told["prompt"], told["seed"] = _pairs(facts["prompts"], facts["seeds"])
    if options.prompt_file is not None:
        del told["prompt"]
    for name in ("image", "last_image"):
        if name in told:
            told[name] = tuple(map(Path, told[name]))
    if "video" in told:
        told["video"] = Path(told["video"])
    for name in ("scalar", "lora"):
        if name in told:
            told[name] = tuple(told[name])
    return completed(options, told)


def completed(options: T, told: Mapping[str, Any]) -> T:
    """The options with what was told, where the command line says nothing."""
    default = _defaults(options)
    return replace(options, **{name: value for name, value in told.items() if getattr(options, name) == default[name]})  # type: ignore[type-var]


def _defaults(options: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(options)}


def scalars_of(options: Sample) -> dict[str, float]:
    """The numbers by name. UsageError for a word that is no `name=number`, and for a name that is given twice."""
    found: dict[str, float] = {}
    for word in options.scalar:
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


def warn_of_others(like: Path | None, made: Mapping[str, Any]) -> None:
    """Say where the weights are not those that made the file."""
    if like is not None and (before := facts_of(like, made["made by"])["denoiser"]) != made["denoiser"]:
        print(f"{like} was made by other weights ({before}), so the clips will differ", file=sys.stderr)


def _pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The prompts and seeds of a command line that asks for these clips."""
    if (list(seeds) == list(range(seeds[0], seeds[0] + len(prompts))) and len(set(prompts)) > 1) or len(prompts) == 1:
        return tuple(prompts), (seeds[0],)
    different = tuple(dict.fromkeys(seeds))
    return tuple(prompts[:: len(different)]), different


def facts_of(path: Path, command: str) -> dict[str, Any]:
    """What a file says of how `command` made it. UsageError where it says nothing, or names another command."""
    try:
        facts: dict[str, Any] = json.loads(read_note(path))
        if all(key in facts for key in ("options", "prompts", "seeds", "denoiser")) and facts.get("made by") == command:
            return facts
    except json.JSONDecodeError:
        pass
    raise UsageError(f"--like {path}: it does not say how it was made; give a file that {command} wrote, unchanged")
