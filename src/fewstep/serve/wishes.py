"""What a client asks a clip to be, and the clip that its model makes of that. What the model was not trained for is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from fewstep.core.bounds import Amount, Bounds, Count, Size
from fewstep.core.build import At, RecipeError, build
from fewstep.serve.errors import ApiError
from fewstep.serve.limits import Limits
from fewstep.serve.orders import Facts
from fewstep.serve.protocol import LONGEST_PROMPT, Seed, require_prompt

MOST_STEPS, MOST_PROMPTS = 200, 100


@dataclass(frozen=True, kw_only=True)
class Later:
    """Another prompt, from the first chunk on that starts then."""

    at_s: Amount
    """Second of the video."""
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The fields of `POST /v1/videos`: those of OpenAI's API, and more under the names that others gave them."""

    prompt: str
    model: str | None = None
    """None: the first model of the server."""
    seconds: Annotated[float, Bounds(above=0)] | None = None
    size: str | None = None
    """WIDTHxHEIGHT. A model makes its own size only."""
    width: Size | None = None
    height: Size | None = None
    num_frames: Count | None = None
    """In place of `seconds`."""
    fps: Annotated[float, Bounds(1, 240)] | None = None
    """Frames per second of the file; None: the model's."""
    seed: Seed = 0
    num_inference_steps: Annotated[int, Bounds(1, MOST_STEPS)] | None = None
    guidance_scale: Annotated[float, Bounds(-100, 100)] | None = None
    negative_prompt: str | None = None
    prompt_schedule: tuple[Later, ...] = ()
    """Of a student that streams: prompts that follow."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A clip that its model can make."""

    model: str
    prompt: str
    frames: int
    fps: float
    """Frames per second of the file."""
    width: int
    height: int
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    schedule: tuple[tuple[float, str], ...] = ()
    """Seconds of the stream, at the model's own rate, and the prompts from then on."""
    picture: bool = False
    """Whether it begins with a picture."""

    @property
    def seconds(self) -> float:
        """Length of the file."""
        return self.frames / self.fps


def asked_of(given: Mapping[str, Any]) -> Asked:
    """The fields of a request, from JSON or a form, where numbers are texts. `ApiError` names the field that is wrong."""
    hints, found = get_type_hints(Asked, include_extras=True), dict[str, Any]()
    for name, value in given.items():
        if name not in hints:
            raise _wrong(name[:40], f"there is no field {name[:40]!r}; there are {', '.join(hints)}, input_reference")
        text = str in (hints[name], *get_args(hints[name]))
        try:
            found[name] = build(
                hints[name], value if text or not isinstance(value, str) else json_or_text(value), {}, At(name)
            )
        except RecipeError as error:
            raise _wrong(name, str(error)) from None
    if "prompt" not in found:
        raise _wrong("prompt", "prompt is missing: say what the video shows")
    asked = Asked(**found)
    prompts = {"prompt": asked.prompt} | {
        f"prompt_schedule[{i}]": x.prompt for i, x in enumerate(asked.prompt_schedule)
    }
    for name, prompt in prompts.items():
        try:
            require_prompt(prompt)
        except ValueError as error:
            raise _wrong(name, f"{name}: {error}") from None
    if len(asked.negative_prompt or "") > LONGEST_PROMPT:
        raise _wrong("negative_prompt", f"negative_prompt: it has at most {LONGEST_PROMPT} characters")
    return asked


def wish_of(asked: Asked, facts: Facts, limits: Limits, *, picture: bool) -> Wish:
    """The clip that `asked` is for the model of `facts`. `ApiError` says what its contract or the server allows instead."""
    fps = facts.fps if asked.fps is None else asked.fps
    _require_size(asked, facts)
    if facts.steps and asked.num_inference_steps not in (None, *facts.steps):
        counts = " or ".join(map(str, facts.steps))
        raise _wrong(
            "num_inference_steps", f"{facts.name} was trained for {counts} steps, not for {asked.num_inference_steps}"
        )
    if picture != facts.takes_image:
        problem = "begins with a picture; send one as input_reference" if facts.takes_image else "takes no picture"
        raise _wrong("input_reference", f"{facts.name} {problem}")
    frames = _frames(asked, facts, fps, limits)
    return Wish(
        model=facts.name, prompt=asked.prompt, frames=frames, fps=fps, width=facts.width, height=facts.height,
        seed=asked.seed, steps=asked.num_inference_steps, guidance=_guidance(asked, facts),
        negative_prompt=asked.negative_prompt, schedule=_schedule(asked, facts, frames, fps), picture=picture,
    )  # fmt: skip


def _require_size(asked: Asked, facts: Facts) -> None:
    size = f"{facts.width}x{facts.height}"
    if asked.size not in (None, size):
        raise _wrong("size", f"{facts.name} makes videos of {size} (width x height), not of {asked.size!r:.40}")
    for name in ("width", "height"):
        if getattr(asked, name) not in (None, getattr(facts, name)):
            raise _wrong(
                name, f"{facts.name} makes videos of {size} (width x height), not of {name} {getattr(asked, name)}"
            )


def _frames(asked: Asked, facts: Facts, fps: float, limits: Limits) -> int:
    frames, param = asked.num_frames, "num_frames"
    if asked.seconds is not None:
        exact, param = asked.seconds * fps, "seconds"
        whole = min(max(1, round(min(exact, 1e9))), 10**9)
        if abs(exact - whole) > 0.01:
            near = " or ".join(
                f"{n / fps:.8g}" for n in sorted({max(1, int(min(exact, 1e9))), int(min(exact, 1e9)) + 1})
            )
            raise _wrong(param, f"a video of {fps:g} frames per second has a whole number of them; give seconds {near}")
        if frames not in (None, whole):
            raise _wrong(
                param,
                f"{asked.seconds:g} seconds have {whole} frames at {fps:g} per second, not {frames}; give one of both",
            )
        frames = whole
    if frames is None:
        return facts.frames
    if not facts.streams and frames != facts.frames:
        only = f"{facts.frames} frames, {facts.frames / fps:.8g} seconds at {fps:g} frames per second"
        raise _wrong(param, f"{facts.name} makes videos of {only}; leave {param} out")
    most = min(int(limits.seconds * facts.fps), limits.clip // (3 * facts.width * facts.height))
    if frames > most:
        raise _wrong(param, f"a video of {facts.name} has at most {most} frames here, {most / fps:.8g} seconds")
    return frames


def _guidance(asked: Asked, facts: Facts) -> float | None:
    scale = asked.guidance_scale
    if not facts.guided and scale not in (None, facts.guidance):
        raise _wrong(
            "guidance_scale",
            f"guidance was distilled into {facts.name}, so its guidance_scale is {facts.guidance:g}; leave it out",
        )
    if asked.negative_prompt is not None and (facts.guidance if scale is None else scale) == 1:
        raise _wrong(
            "negative_prompt", f"{facts.name} is sampled without guidance, so it reads no negative prompt; leave it out"
        )
    return None if scale == facts.guidance else scale


def _schedule(asked: Asked, facts: Facts, frames: int, fps: float) -> tuple[tuple[float, str], ...]:
    times = [later.at_s for later in asked.prompt_schedule]
    if not times:
        return ()
    problem = ""
    if not facts.streams:
        problem = f"{facts.name} makes whole clips, of one prompt; leave prompt_schedule out"
    elif len(times) > MOST_PROMPTS or any(b <= a for a, b in zip(times, times[1:])):
        problem = f"prompt_schedule: at most {MOST_PROMPTS} prompts, each later than the one before"
    elif times[-1] * fps >= frames:
        problem = f"prompt_schedule: the video ends at {frames / fps:.8g} s, before the prompt of {times[-1]:g} s"
    if problem:
        raise _wrong("prompt_schedule", problem)
    return tuple((later.at_s * fps / facts.fps, later.prompt) for later in asked.prompt_schedule)


def json_or_text(text: str) -> Any:
    """A value of a form."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
