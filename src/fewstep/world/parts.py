"""Parts of the built-in world's prompts: by what they say of one attribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.data.base import DataError
from fewstep.data.parts import Encode, Partition
from fewstep.world.grammar import ATTRIBUTES, match_words, tokens


@dataclass(frozen=True, kw_only=True)
class ByAttribute(Partition):
    """The value of one attribute: its values in their order, as many for each part (MSD's rule for classes, 2410.23274).

    >>> [ByAttribute(attribute="shape", of=2).part(f"a {s} moves up") for s in ("red circle", "red star")]
    [0, 1]
    """

    attribute: Literal["shape", "colour", "size", "direction", "speed", "background"] = "shape"
    """What is looked at in a prompt, in whatever words."""

    def __post_init__(self) -> None:
        values = len(ATTRIBUTES[self.attribute])
        if self.of < 1 or values % self.of:
            raise ValueError(
                f"of is {self.of}, and {self.attribute} has {values} values, which parts of one size cannot share; write a "
                f"divisor of {values}"
            )

    def part(self, prompt: str, encode: Encode | None = None) -> int:
        values, said = ATTRIBUTES[self.attribute], match_words(tokens(prompt))[0][self.attribute]
        if len(said) != 1:
            raise DataError(f"{prompt!r} belongs to no part: name one {self.attribute} of {', '.join(values)}")
        return values.index(said[0]) * self.of // len(values)
