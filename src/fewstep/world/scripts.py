"""Scripts: scenes that change at known frames, their text, and their clips of any length.

A script is a prompt with clauses: "a small red ring moves slowly left over a navy background, then turns up at 3 s, then
becomes blue and speeds up at 5.5 s".  `parse_script` is as strict as `grammar.parse`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.world.grammar import ATTRIBUTES, SPEEDS, Scene, describe, match_words, parse, tokens
from fewstep.world.renderer import CANVAS, Variation, render, velocity

FPS = 8
"""Frames per second of the world."""
EXAMPLE = "a small red ring moves slowly left over a navy background, then turns up at 3 s, then becomes blue at 5.5 s"
_CLAUSE = re.compile(r"(?P<changes>.+?) at (?P<second>\d+(?:\.\d+)?) ?(?:s|seconds?)\.?")
_PACE = {"speeds up": "quickly", "slows down": "slowly"}
_VERBS = frozenset({"turns", "becomes"})


@dataclass(frozen=True)
class Script:
    """Scenes of one clip, and the frame from which each holds. ValueError unless frames rise from 0 and neighbours differ."""

    scenes: tuple[Scene, ...]
    starts: tuple[int, ...] = (0,)

    _rule: ClassVar[str] = "a script has one start per scene, the first at frame 0, each after the one before"

    def __post_init__(self) -> None:
        if len(self.scenes) != len(self.starts) or self.starts[:1] != (0,):
            raise ValueError(f"{self._rule}; got {len(self.scenes)} scenes and starts {self.starts}")
        if any(b <= a for a, b in pairwise(self.starts)):
            raise ValueError(f"{self._rule}; got starts {self.starts}")
        for start, (before, after) in zip(self.starts[1:], pairwise(self.scenes), strict=True):
            if before == after:
                raise ValueError(f"nothing changes at {start / FPS:g} s; leave this change out")

    def at(self, frame: int) -> Scene:
        """The scene that holds at a frame."""
        return self.scenes[sum(start <= frame for start in self.starts) - 1]

    def during(self, first: int, last: int) -> Scene | None:
        """The scene of frames `first` up to `last`, without it; None if it changes between them."""
        return None if any(first < start < last for start in self.starts) else self.at(first)


def describe_script(script: Script) -> str:
    """The canonical text of a script.

    >>> describe_script(parse_script(EXAMPLE)) == EXAMPLE
    True
    """
    parts = [describe(script.scenes[0])]
    for start, (before, after) in zip(script.starts[1:], pairwise(script.scenes), strict=True):
        parts.append(f"{_changes(before, after)} at {start / FPS:g} s")
    return ", then ".join(parts)


def parse_script(text: str) -> Script:
    """Read a script, or a plain prompt: a script of one scene.

    ValueError names the clause with an unknown word, two values of one attribute, a missing or fractional frame, or no change.
    """
    first, *clauses = re.split(r",? then ", " ".join(text.split()))
    scenes, starts = [parse(first)], [0]
    for clause in clauses:
        found = _CLAUSE.fullmatch(clause)
        if found is None:
            raise ValueError(
                f"cannot read {clause!r}: it must end with its time, such as 'at 3 s'. A good script: {EXAMPLE!r}"
            )
        frame = float(found["second"]) * FPS
        if frame != round(frame):
            raise ValueError(
                f"cannot read {clause!r}: {found['second']} s is between two frames; give a multiple of {1 / FPS} s"
            )
        scenes.append(_changed(scenes[-1], found["changes"]))
        starts.append(round(frame))
    return Script(tuple(scenes), tuple(starts))


def render_script(
    scripts: Sequence[Script], variation: Variation, num_frames: int = 16, size: int = CANVAS, style: str = "plain"
) -> Tensor:
    """Draw one clip per script: float32 `[B, 3, num_frames, size, size]` in [-1, 1], as `renderer.render` draws scenes.

    The object goes on from where it is when its scene changes. A script of one scene is drawn bit for bit as by `render`.
    """
    if len(scripts) != len(variation.tilt):
        raise ValueError(f"{len(scripts)} scripts but {len(variation.tilt)} variations; give one variation per script")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    clips = [_clip(script, variation.row(i), num_frames, size, style) for i, script in enumerate(scripts)]
    return torch.cat(clips) if clips else torch.empty(0, 3, num_frames, size, size)


def _clip(script: Script, variation: Variation, num_frames: int, size: int, style: str) -> Tensor:
    parts = []
    for scene, start, stop in zip(script.scenes, script.starts, (*script.starts[1:], num_frames), strict=True):
        length = min(stop, num_frames) - start
        if length <= 0:
            break
        parts.append(render([scene], variation, length, size, style))
        variation = replace(variation, position=variation.position + length * velocity([scene], variation))
    return torch.cat(parts, 2)


def _changes(before: Scene, after: Scene) -> str:
    """The clause that makes the second scene of the first."""
    new = {name: getattr(after, name) for name in ATTRIBUTES if getattr(after, name) != getattr(before, name)}
    said = []
    looks = [new[name] for name in ("size", "colour") if name in new] + (
        [f"a {new['shape']}"] if "shape" in new else []
    )
    if looks:
        said.append(f"becomes {' and '.join(looks)}")
    if "background" in new:
        said.append(f"moves over a {new['background']} background")
    if "direction" in new:
        said.append(f"turns {new['direction']}")
    if "speed" in new:
        said.append(next(words for words, speed in _PACE.items() if speed == new["speed"]))
    return " and ".join(said)


def _changed(scene: Scene, words: str) -> Scene:
    """The scene after a clause."""
    new: dict[str, str] = {}
    for phrase, speed in _PACE.items():
        if re.search(rf"\b{phrase}\b", words):
            if "speed" in new or scene.speed == speed:
                raise ValueError(f"cannot read {words!r}: it already moves {scene.speed}, one of {', '.join(SPEEDS)}")
            words, new["speed"] = re.sub(rf"\b{phrase}\b", " ", words), speed
    found, unknown = match_words(tokens(words))
    unknown = [word for word in unknown if word not in _VERBS]
    if unknown:
        raise ValueError(f"cannot read {words!r}: unknown words: {', '.join(unknown)}. A good script: {EXAMPLE!r}")
    for name, values in found.items():
        if len(values) + (name in new) > 1:
            raise ValueError(f"cannot read {words!r}: {name} is ambiguous ({' and '.join([*values, *new.values()])})")
        new.update((name, value) for value in values)
    if replace(scene, **new) == scene:
        raise ValueError(f"cannot read {words!r}: it changes nothing; say what turns, becomes or speeds up")
    return replace(scene, **new)
