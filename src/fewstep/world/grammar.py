"""The language of the built-in world: scenes of six attributes, and English sentences for them.

A `Scene` is one value per attribute.  `describe` writes its canonical sentence, `paraphrase` writes a random one, and `parse`
reads both.  `parse` refuses what it does not understand (an unknown word, two directions) and never guesses, because a prompt
that is read only in part cannot be checked against the pixels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from types import MappingProxyType

import torch

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white")
SIZES = ("small", "large")
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("black", "navy", "forest", "maroon", "gray", "sand")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": SIZES,
        "direction": DIRECTIONS,
        "speed": SPEEDS,
        "background": BACKGROUNDS,
    }
)
"""Attribute name -> its values, in the order used by every index tuple and every `[B, 6]` tensor of this room."""

EXAMPLE = "a small red ring moves slowly up-left over a navy background"

# Phrases that `paraphrase` may use for each value, besides the value itself.  Every phrase belongs to exactly one value
# (`_lexicon` checks this).  The longest match wins, so "dark green" is a background although "green" is an object colour.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "ball"),
    "square": ("box", "block"),
    "triangle": ("three-cornered shape",),
    "ring": ("hoop", "donut"),
    "cross": ("plus sign", "plus"),
    "star": ("five-pointed star",),
    "red": ("scarlet", "bright red"),
    "orange": ("tangerine", "bright orange"),
    "yellow": ("lemon", "bright yellow"),
    "green": ("lime", "bright green"),
    "cyan": ("aqua", "turquoise"),
    "blue": ("azure", "bright blue"),
    "magenta": ("fuchsia", "bright magenta"),
    "white": ("snowy", "bright white"),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "right": ("to the right", "rightward", "rightwards", "toward the right"),
    "left": ("to the left", "leftward", "leftwards", "toward the left"),
    "up": ("upward", "upwards", "straight up", "toward the top"),
    "down": ("downward", "downwards", "straight down", "toward the bottom"),
    "slowly": ("gently", "leisurely", "at a slow pace", "at low speed"),
    "quickly": ("fast", "rapidly", "swiftly", "at a quick pace", "at high speed"),
    "black": ("pitch black",),
    "navy": ("navy blue", "dark blue"),
    "forest": ("forest green", "dark green"),
    "maroon": ("dark red",),
    "gray": ("grey",),
    "sand": ("sandy", "beige", "tan"),
} | {
    f"{up}-{side}": (
        f"toward the {upper} {side}",
        f"to the {upper} {side}",
        f"toward the {top} {side} corner",
        f"{up} and to the {side}",
        f"{up} and {side}",
        f"diagonally {up} and {side}",
        f"{side} and {up}",
        f"{up}ward and to the {side}",
    )
    for up, upper, top in (("up", "upper", "top"), ("down", "lower", "bottom"))
    for side in ("left", "right")
}

# Read but never written: adjectives, which do not fit the sentence patterns below.
_READ_ONLY: Mapping[str, tuple[str, ...]] = {"slowly": ("slow",), "quickly": ("quick",)}

_VERBS = ("moves", "drifts", "glides", "travels", "slides", "floats", "heads", "is moving", "is drifting", "is gliding")
_FILLER_WORDS = """
    a an the this that which is in of with on over across against to toward towards and it its there at
    color colour size sized corner background backdrop field direction pace speed straight diagonally
    move moves moving drift drifts drifting glide glides gliding travel travels travelling traveling
    slide slides sliding float floats floating head heads heading
"""
_FILLER = frozenset(_FILLER_WORDS.split())


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one clip: one value for each of `ATTRIBUTES`. `ValueError` names a value that does not exist."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    background: str

    def __post_init__(self) -> None:
        for name, accepted in ATTRIBUTES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"Scene.{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")

    def to_indices(self) -> tuple[int, ...]:
        """The six positions of the values in `ATTRIBUTES`."""
        return tuple(values.index(value) for values, value in zip(ATTRIBUTES.values(), astuple(self), strict=True))

    @classmethod
    def from_indices(cls, indices: Sequence[int]) -> "Scene":
        """The inverse of `to_indices`; `ValueError` for a wrong count or an index outside its attribute."""
        if len(indices) != len(ATTRIBUTES):
            raise ValueError(f"a scene has {len(ATTRIBUTES)} indices ({', '.join(ATTRIBUTES)}), got {len(indices)}")
        for (name, values), index in zip(ATTRIBUTES.items(), indices, strict=True):
            if not 0 <= index < len(values):
                raise ValueError(f"index {index} of {name} is outside 0..{len(values) - 1}")
        return cls(**{name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), indices, strict=True)})


def sample_scenes(n: int, generator: torch.Generator) -> list[Scene]:
    """Draw `n` scenes, every attribute uniform and independent."""
    columns = [
        torch.randint(len(values), (n,), generator=generator, device=generator.device).tolist()
        for values in ATTRIBUTES.values()
    ]
    return [Scene.from_indices(row) for row in zip(*columns, strict=True)]


def describe(scene: Scene) -> str:
    """The canonical sentence of a scene.

    >>> describe(parse("over a dark blue backdrop, a tiny scarlet hoop drifts gently to the upper left"))
    'a small red ring moves slowly up-left over a navy background'
    """
    return (
        f"a {scene.size} {scene.colour} {scene.shape} moves {scene.speed} {scene.direction} "
        f"over a {scene.background} background"
    )  # fmt: skip


def paraphrase(scene: Scene, generator: torch.Generator) -> str:
    """A random sentence for the scene (word order and synonyms vary); `parse` reads it back to the same scene."""

    def choose(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator, device=generator.device))]

    def say(value: str) -> str:
        return choose((value, *_SYNONYMS[value]))

    size, colour, shape, background = say(scene.size), say(scene.colour), say(scene.shape), say(scene.background)
    verb, speed, direction = choose(_VERBS), say(scene.speed), say(scene.direction)
    subject = choose(
        (
            f"{_article(size)} {size} {colour} {shape}",
            f"{_article(size)} {size} {colour} {shape}",  # twice: the plain order stays the commonest
            f"{_article(size)} {size}, {colour} {shape}",
            f"{_article(colour)} {colour} {shape} of {size} size",
            f"{_article(shape)} {shape} that is {size} and {colour}",
        )
    )
    motion = [f"{verb} {speed} {direction}", f"{verb} {direction} {speed}"]
    if " " not in speed + verb and speed != "fast":  # "fast moves" and "slowly is moving" are not English
        motion.append(f"{speed} {verb} {direction}")
    place = choose(("over", "on", "against", "across")) + f" {_article(background)} {background} "
    place += choose(("background", "backdrop", "field"))
    moved = choose(motion)
    return choose((f"{subject} {moved} {place}", f"{place}, {subject} {moved}", f"{subject} {place} {moved}"))


def world_prompts(count: int, paraphrased: float, seed: int) -> tuple[str, ...]:
    """`count` random prompts from `seed`: the canonical sentence, or, with probability `paraphrased`, another wording."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    varied = torch.rand(count, generator=generator) < paraphrased
    return tuple(paraphrase(s, generator) if v else describe(s) for s, v in zip(scenes, varied.tolist(), strict=True))


def parse(prompt: str) -> Scene:
    """Read a sentence of the grammar.

    Raises `ValueError` naming each missing attribute, each attribute with two different values, or the words that are not in
    the vocabulary, with an example of a good prompt.
    """
    found, unknown = match_words(tokens(prompt))
    faults = []
    for name, accepted in ATTRIBUTES.items():
        if len(found[name]) > 1:
            faults.append(f"{name} is ambiguous ({' and '.join(found[name])})")
        elif not found[name]:
            faults.append(f"{name} is missing (one of {', '.join(accepted)})")
    if unknown:
        faults.append(f"unknown words: {', '.join(unknown)}")
    if faults:
        raise ValueError(f"cannot read {prompt!r}: {'; '.join(faults)}. A good prompt: {EXAMPLE!r}")
    return Scene(**{name: values[0] for name, values in found.items()})


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def tokens(text: str) -> tuple[str, ...]:
    """The words of a text, in lower case."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def _lexicon() -> dict[tuple[str, ...], tuple[str, str]]:
    """Word sequence -> (attribute, value)."""
    entries: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, values in ATTRIBUTES.items():
        for value in values:
            for phrase in (value, *_SYNONYMS[value], *_READ_ONLY.get(value, ())):
                if entries.setdefault(tokens(phrase), (name, value)) != (name, value):
                    raise AssertionError(
                        f"the phrase {phrase!r} names two values: {value} and {entries[tokens(phrase)][1]}"
                    )
    # Words for corners and edges alone, so that any preposition may come before them.
    for corner, up in (("upper", "up"), ("top", "up"), ("lower", "down"), ("bottom", "down")):
        for side in ("left", "right"):
            entries[(corner, side)] = ("direction", f"{up}-{side}")
    for words, value in (("top", "up"), ("bottom", "down")):
        entries[(words,)] = ("direction", value)
    return entries


_LEXICON = _lexicon()
_LONGEST = max(map(len, _LEXICON))


def match_words(words: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """Greedy longest match from left to right: the distinct values found for each attribute, and the unknown words."""
    found: dict[str, list[str]] = {name: [] for name in ATTRIBUTES}
    unknown, at = [], 0
    while at < len(words):
        length = next((n for n in range(_LONGEST, 0, -1) if words[at : at + n] in _LEXICON and at + n <= len(words)), 0)
        if length:
            name, value = _LEXICON[words[at : at + length]]
            if value not in found[name]:
                found[name].append(value)
        elif words[at] not in _FILLER:
            unknown.append(words[at])
        at += max(length, 1)
    return found, unknown
