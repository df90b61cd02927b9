"""The subject of the checks: one model at one size, with the inputs that all checks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.attention import BlockCausal, Dense
from fewstep.core import Cond, Rng
from fewstep.core.bounds import Size, require_bounds
from fewstep.models import Denoiser, VideoModel
from fewstep.models.backbone import Backbone, Original
from fewstep.models.repattern import repattern
from fewstep.world.grammar import world_prompts

if TYPE_CHECKING:
    from fewstep.models.adapters.layout import Layout

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # diffusers' time features are never better than float32
_LATENT_FRAMES, _LATENT_SIZE = 3, (8, 16)
_SMALL = 4096
"""Largest number of latent pixels of a clip that is checked at its own size."""


class NotApplicable(Exception):
    """A check does not apply to this model; the message says why."""


class Fault(Exception):
    """A check failed in a way that is not a figure."""


@dataclass(frozen=True)
class Measured:
    """A figure that must be at most `bound`, or at least `bound` with `at_least`. NaN never passes."""

    figure: float
    bound: float
    note: str = ""
    at_least: bool = False

    @property
    def good(self) -> bool:
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size and inputs of the checks. None: the model's own size if it is small, else a small one."""

    num_frames: Size | None = None
    height: Size | None = None
    width: Size | None = None
    steps: Size = 4
    """Number of sampling steps."""
    seed: int = 0
    prompts: tuple[str, ...] = ()
    """Prompts; the first is the caption of `video`. Empty: prompts of the built-in world, which any trained model can
    denoise."""
    video: Path | None = None
    """Video file for the checks that need trained weights; None: a rendered clip."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.video is not None and not self.video.is_file():
            raise FileNotFoundError(f"{self.video}: no such video file; give the path of one")


class Subject:
    """A model under test. It is not changed: checks that need another pattern or other blocks use a `twin`."""

    def __init__(self, model: VideoModel, options: Options) -> None:
        self.options, self.model = options, _sized(model, options)
        self.tokens = math.prod(model.latent_shape()[1:])
        """Number of latent pixels of a clip of the model's own size, on which its times depend."""
        self.network: Denoiser = self.model.denoiser.eval()
        self.dtype = next(self.network.parameters()).dtype
        if self.dtype not in _TOLERANCE:
            raise ValueError(
                f"networks are checked in float32 or float64, not in {self.dtype}; load the model in float32"
            )
        self.tolerance = _TOLERANCE[self.dtype]
        self.shape = self.model.latent_shape()
        self.failed: set[str] = set()
        self.captions = options.prompts or world_prompts(2, 0.0, options.seed)
        self.prompts = tuple((self.captions * 2)[:2])
        self.cond, self.uncond = self.conditions(self.prompts)
        self.x_t = self.randn("x_t", 2)
        self.t = torch.tensor([0.9037, 0.3513], device=self.model.device, dtype=self.dtype)
        self.backbone.embed(self.x_t, self.t, self.cond)  # ValueError if the network does not accept this size

    def conditions(self, prompts: Sequence[str], frames: Tensor | None = None) -> tuple[Cond, Cond]:
        """Conditions of the model; an image-to-video model gets the ends of `frames` `[3, F, H, W]` (default: any)."""
        return self.model.conditions(prompts, **self.images(frames))

    def images(self, frames: Tensor | None = None) -> dict[str, Any]:
        """First and last of `frames` (default: any) as arguments of `VideoModel.latents`; empty for text-to-video models."""
        if "image" not in self.model.parts:
            return {}
        if frames is None:  # colours that an 8-bit image can hold
            size = (3, 2, self.model.card.height, self.model.card.width)
            frames = (256 * Rng(self.options.seed).rand(size, "conformance/images")).floor() / 127.5 - 1
        last = {"last_image": frames[:, -1]} if self.model.part("image").needs_last else {}
        return {"image": frames[:, 0]} | last

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    @cached_property
    def original(self) -> Original:
        """The diffusers networks with the same weights."""
        made = self.backbone.original()
        if made is None:
            raise NotApplicable(
                f"{type(self.backbone).__name__} belongs to fewstep: diffusers has no class to compare with"
            )
        return made

    @property
    def layout(self) -> Layout:
        """The folder in diffusers' layout from which the model came (for a student: its text encoder or codec)."""
        sources = self.model.card.sources
        if not sources:
            raise NotApplicable("the card names no folder in diffusers' layout")
        from fewstep.models.adapters.layout import Layout

        if "denoiser" in sources:
            return Layout.find(sources["denoiser"], getattr(self.backbone, "folders", ()))
        return Layout.find(next(iter(sources.values())))

    def require(self, *checks: str) -> None:
        """Skip this check if one of these `checks` failed, because the same fault would make it fail too."""
        if broken := [name for name in checks if name in self.failed]:
            raise NotApplicable(f"correct {', '.join(broken)} first")

    @property
    def dense(self) -> Denoiser:
        """The denoiser with full attention, as in the original network."""
        return repattern(self.network, Dense()) if hasattr(self.backbone, "pattern") else self.network

    @property
    def pattern(self) -> BlockCausal:
        """A causal pattern: the network's own, or frame by frame."""
        if not hasattr(self.backbone, "rotary"):
            raise NotApplicable(f"{type(self.backbone).__name__} takes whole clips only: no cache, one time per clip")
        own = self.backbone.pattern
        return own if isinstance(own, BlockCausal) else BlockCausal(chunk=1)

    def randn(self, name: str, batch: int) -> Tensor:
        rng = Rng(self.options.seed, device=str(self.model.device))
        return rng.randn((batch, *self.shape), f"conformance/{name}").to(self.dtype)

    def time(self, t: float) -> Tensor:
        """The time `t` as a tensor for one sample."""
        return self.t.new_full((1,), t)

    def twin(self, **changes: Any) -> Denoiser:
        """The same denoiser with other attributes of its backbone; the weights are shared."""
        network, backbone = copy.copy(self.network), copy.copy(self.backbone)
        network._modules, backbone._modules = dict(network._modules), dict(backbone._modules)
        for name, value in changes.items():
            setattr(backbone, name, value)
        network.backbone = backbone
        return network


def relative(value: Tensor, truth: Tensor) -> float:
    """`|value - truth| / |truth|`; 0 if they are equal, even if both are zero."""
    if value.shape != truth.shape:
        raise Fault(f"the shape is {tuple(value.shape)}, and should be {tuple(truth.shape)}")
    difference = (value.double() - truth.double()).norm()
    return float(difference / truth.double().norm()) if difference else 0.0


def worst(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference; NaN if one of them is NaN."""
    return float(torch.tensor([relative(value, truth) for value, truth in pairs], dtype=torch.float64).max())


def _sized(model: VideoModel, options: Options) -> VideoModel:
    """The model with a card for the size of the checks."""
    card, (_, frames, rows, columns) = model.card, model.latent_shape()
    size: dict[str, Any] = {"num_frames": card.num_frames, "height": card.height, "width": card.width}
    large = frames * rows * columns > _SMALL
    if large and model.denoiser.backbone.any_size:
        size["height"] = card.height // rows * min(rows, _LATENT_SIZE[0])
        size["width"] = card.width // columns * min(columns, _LATENT_SIZE[1])
    if large:
        size["num_frames"] = next(
            n for n in range(1, card.num_frames + 1) if _frames(model, n) >= min(frames, _LATENT_FRAMES)
        )
    given = {name: getattr(options, name) for name in size}
    size |= {name: value for name, value in given.items() if value is not None}
    return model.with_card(**size)


def _frames(model: VideoModel, num_frames: int) -> int:
    """Latent frames of a clip of `num_frames`; 0 if the codec refuses that number."""
    try:
        return model.latent_shape(num_frames)[1]
    except ValueError:
        return 0
