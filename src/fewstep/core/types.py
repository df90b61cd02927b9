"""Types shared between rooms: conditions, batches, named losses.

Shapes: latents are `[B, C, F, H, W]`, text states `[B, L, D]`, time `t` is `[B]` or `[B, F]` with 0 = data, 1 = noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Losses = Mapping[str, Tensor]
"""Named scalar terms of one graph. The engine adds them up and runs backward once."""

KV = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each `[B, H, N, D]`, keys without rotary position."""


@dataclass(frozen=True)
class Cond:
    """What a clip shall show: text states `[B, L, D]` and a mask `[B, L]` that is True on real tokens."""

    text: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Further conditions by name, each `[B, ...]` (pooled text, image states), which an encoder passes to its own denoiser."""
    framewise: frozenset[str] = frozenset()
    """Those of `extra` that are told of every latent frame, `[B, F, ...]`: keys that are held, where the camera is."""

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: Tensor | slice) -> Cond:
        return self._each(lambda x: x[index])

    def to(self, device: str | torch.device) -> Cond:
        return self._each(lambda x: x.to(device))

    def expand(self, batch: int) -> Cond:
        """The single condition of this object, repeated `batch` times."""
        return self._each(lambda x: x.expand(batch, *x.shape[1:]))

    def where(self, keep: Tensor, other: Cond) -> Cond:
        """This condition where `keep` `[B]` is True, `other` elsewhere (condition dropout)."""
        return Cond._join([self, other], lambda x, y: torch.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y))

    def with_extra(self, extra: Mapping[str, Tensor], *, framewise: bool = False) -> Cond:
        """This condition and more; `framewise`: what is added is told of every latent frame."""
        names = self.framewise | extra.keys() if framewise else self.framewise - extra.keys()
        return Cond(self.text, self.mask, {**self.extra, **extra}, frozenset(names))

    def during(self, first: int, frames: int) -> Cond:
        """This condition for so many latent frames, from `first` on. ValueError where it does not reach so far."""
        for name in sorted(self.framewise):
            if (told := self.extra[name].shape[1]) < first + frames:
                raise ValueError(
                    f"the condition tells {name!r} of {told} latent frames, and frame {first + frames - 1} is asked for; "
                    "tell it of as many as are made"
                )
        part = {name: x[:, first : first + frames] if name in self.framewise else x for name, x in self.extra.items()}
        return replace(self, extra=part)

    def at(self, frames: Tensor) -> Cond:
        """This condition for one latent frame of each clip, whose number is `frames` `[B]`."""
        rows = torch.arange(len(self), device=frames.device)
        own = {name: x[rows, frames][:, None] if name in self.framewise else x for name, x in self.extra.items()}
        return replace(self, extra=own)

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        return Cond._join(parts, lambda *tensors: torch.cat(tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them: text, mask, then what is extra."""
        return self.text, self.mask, *self.extra.values()

    def _each(self, change: Callable[[Tensor], Tensor]) -> Cond:
        extra = {name: change(x) for name, x in self.extra.items()}
        return Cond(change(self.text), change(self.mask), extra, self.framewise)

    @staticmethod
    def _join(parts: list[Cond], join: Callable[..., Tensor]) -> Cond:
        """ValueError where the parts have not the same extra conditions."""
        names = parts[0].extra.keys()
        if any(part.extra.keys() != names for part in parts):
            have = "; ".join(", ".join(sorted(part.extra)) or "none" for part in parts)
            raise ValueError(f"conditions with different extras cannot be one batch: {have}")
        extra = {name: join(*(part.extra[name] for part in parts)) for name in names}
        framewise = frozenset[str]().union(*(part.framewise for part in parts))
        return Cond(join(*(part.text for part in parts)), join(*(part.mask for part in parts)), extra, framewise)


@dataclass(frozen=True)
class Past:
    """What a teacher that makes clips chunk by chunk has read as the past of its chunks."""

    clips: Tensor
    """Clean clips `[B, C, F, H, W]`: each chunk read the chunks before its own place in them."""
    chunks: tuple[int, ...]
    """Latent frames of each chunk."""


@dataclass(frozen=True)
class Pairs:
    """Stored ODE states of a teacher: `states[:, i]` is `x_t` at `times[i]`; the last is the endpoint at time 0."""

    states: Tensor
    """Stored states, `[B, T+1, C, F, H, W]`."""
    times: tuple[float, ...]
    """Times of the states, decreasing: `times[0] == 1` and `times[-1] == 0`."""
    past: Past | None = None
    """Clips that the teacher read, if it was causal; None: each state is one of a whole clip."""


@dataclass(frozen=True)
class Later:
    """Prompts that follow the first ones on the way through a clip."""

    cond: Cond
    frame: int
    """Latent frame from which they hold, the same in all clips."""
    prompts: tuple[str, ...] = ()


class Carried:
    """What a run carries from one update to the next for the clips of one place (`Rng.place`): tensors by name, in main memory.

    It comes with each batch, and whoever needs it reads and replaces it: a stream that goes on in the next iteration, a bank of
    errors. Checkpoints hold it, so a resumed run goes on bit for bit, with any number of processes. It is no random state and no
    network; what can be computed from `(seed, step, name, place)` is not carried.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All of them, by full name (`stream/seeds`)."""
        return self._tensors

    def part(self, name: str) -> dict[str, Tensor]:
        """Those under `name/`, without that prefix; none at first."""
        return {key.removeprefix(f"{name}/"): x for key, x in self._tensors.items() if key.startswith(f"{name}/")}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Let these be all that is under `name/`, without gradient; an empty mapping forgets what was there."""
        self._tensors = {key: x for key, x in self._tensors.items() if not key.startswith(f"{name}/")}
        self._tensors |= {f"{name}/{key}": x.detach().to("cpu").contiguous() for key, x in tensors.items()}


@dataclass(frozen=True)
class Batch:
    """One batch. Fields a data source does not provide are None; `Method.needs` names those a method reads."""

    cond: Cond
    uncond: Cond
    """Null (or negative) prompt, already expanded to the batch."""
    latent_shape: tuple[int, int, int, int]
    """Shape of the clips to generate, `(C, F, H, W)`."""
    prompts: tuple[str, ...] = ()
    x0: Tensor | None = None
    """Clean latents `[B, C, F, H, W]`."""
    low: Tensor | None = None
    """Latents `[B, C, F, H, W]` of the same clips at a low resolution, scaled up again."""
    pairs: Pairs | None = None
    frames: Tensor | None = None
    """Pixels `[B, 3, F, H, W]` in [-1, 1]."""
    labels: Tensor | None = None
    """Attribute indices `[B, A]`, for the small encoders of the built-in world."""
    later: Later | None = None
    """Prompts that hold from a later frame on."""
    carried: Carried | None = None
    """What the run carries for this place; the engine gives it, not the data."""

    def __len__(self) -> int:
        return len(self.cond)

    def require(self, field: str) -> Any:
        """A field that may be missing; ValueError naming it where it is."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"this batch has no {field}; use data that provide it (Method.needs must name it)")
        return value

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (len(self), *self.latent_shape)

    @property
    def frame_shape(self) -> tuple[int, int, int, int]:
        """Of one latent frame of each clip, `(B, C, H, W)`."""
        channels, _, height, width = self.latent_shape
        return len(self), channels, height, width
