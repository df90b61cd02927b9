"""An input for every latent frame of a network: keys that are held, a beat, numbers of a camera or of sound.

The numbers of a frame are embedded and added to the modulation by which every block knows the time, for the tokens of this frame
alone (keys in HY-WorldPlay, 2512.14614). The new layer begins at zero and reads fixed waves, so a network that was just changed
computes what it computed before. Not from the paper: one linear layer over waves instead of an embedding of each key, and that it
is added behind the layers of the time instead of before them, which leaves their rounding as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.compress.scalar_input import waves
from fewstep.compress.transform import Transform
from fewstep.core.bounds import Count, Natural, require_bounds

_WAVES, _FASTEST = 16, 30.0
"""Waves that stand for one number, and radians per unit of the fastest."""
_PARTS = 6
"""Vectors that a block's modulation has: shift, scale and gate of its attention and of its MLP."""


@dataclass(frozen=True, kw_only=True)
class FrameInput(Transform):
    """The network reads `Cond.extra[name]`, `[B, F, numbers]`: some numbers for every latent frame of a call.

    A frame's numbers say what happens between the frame before it and this one. In a stream each chunk is told of its own
    frames.
    """

    name: str
    width: Count = 1
    """Numbers for each frame, best about 0 to 1."""
    back: Natural = 0
    """Frames before its own whose numbers a frame reads as well: sound that was heard already."""
    ahead: Natural = 0
    """Frames after its own, likewise. A stream that is told what comes as it comes is late by so many frames."""
    words: tuple[str, ...] = ()
    """What each of the numbers is called, such as keys: left, right, up, down. Needed to name them on the command line."""
    default: float | None = None
    """Value of all numbers if a condition does not contain them. null: a condition must contain them."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if not self.name.isidentifier():
            raise ValueError(f"name must be a word such as 'keys', got {self.name!r}")
        if self.words and len(set(self.words)) != self.width:
            raise ValueError(f"words: {self.width} numbers need as many different names, got {', '.join(self.words)}")

    @property
    def identity(self) -> bool:
        return True

    @property
    def numbers(self) -> int:
        """How many a latent frame reads: those of its own frames, and of each one before and after."""
        return self.width * (self.back + 1 + self.ahead)

    def apply(self, network: Any) -> Any:
        if not network.takes_signals:
            raise ValueError(
                f"a {type(network).__name__} takes no inputs for its frames: it does not add them to the modulation of its blocks"
            )
        if self.name in {signal.told.name for signal in network.signals} | set(network.scalars):
            raise ValueError(f"this network reads an input {self.name!r} already")
        weight = next(network.parameters())
        network.signals.append(Signal(self, network.width, device=weight.device, dtype=weight.dtype))
        return network


class Signal(nn.Module):
    """The embedding of an input for every frame, zero at first."""

    def __init__(self, told: FrameInput, width: int, **place: Any) -> None:
        super().__init__()
        self.told = told
        self.out = nn.utils.skip_init(nn.Linear, told.numbers * _WAVES, _PARTS * width, **place)
        if not self.out.weight.is_meta:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, modulation_BG6E: Tensor, extra: Mapping[str, Tensor], frames: int) -> Tensor:
        """The modulation of each of the `frames` of a call, `[B, F, 6, E]`, with this added. ValueError where a condition does
        not say what is needed."""
        told, shape = self.told, (len(modulation_BG6E), frames, self.told.numbers)
        value_BFK = extra.get(told.name)
        if value_BFK is None and told.default is not None:
            value_BFK = modulation_BG6E.new_full(shape, told.default)
        if value_BFK is None:
            raise ValueError(
                f"this network reads {told.name!r} of every latent frame, and the condition has none; put a tensor "
                f"{list(shape)} into Cond.extra[{told.name!r}], or give FrameInput a default"
            )
        if value_BFK.shape != shape:
            raise ValueError(
                f"Cond.extra[{told.name!r}] must be {list(shape)}, {told.numbers} numbers for every latent frame of the call, "
                f"got {list(value_BFK.shape)}"
            )
        read = waves(value_BFK.to(modulation_BG6E), _WAVES, _FASTEST).flatten(2)
        return modulation_BG6E + self.out(read).unflatten(-1, (_PARTS, -1))
