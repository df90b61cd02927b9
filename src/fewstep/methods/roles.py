"""Roles: a method's networks besides teacher and student, and how each is made."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fewstep.core import Rng
from fewstep.models import BlockHead, Denoiser, FeatureHeads, JointHead, QueryHead, VideoModel
from fewstep.models.lora import Lora, adapt, adapters, duplicate, weaken
from fewstep.models.source import ModelSource

Head = Literal["separate", "joint", "block", "query", "frames"]
"""Discriminator heads on features of several layers: a head per layer, or one on all of them, of convolutions, of a transformer
block, or of queries."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """Everything from which a role can be made."""

    roles: Mapping[str, nn.Module]
    """Networks that exist already, by role."""
    seed: int = 0
    lora: Lora | None = None
    """Adapters to use for copies, over the weights of the copied network; None: copies are whole networks."""
    device: str | None = None
    """Device for new weights; None: the device of the network whose features they read."""
    others: Mapping[str, VideoModel] = field(default_factory=dict)
    """Models requested by roles with a `source`, by role."""
    codec: nn.Module | None = None
    """Autoencoder of the run's model; None: it has none."""

    def denoiser(self, role: str) -> Denoiser:
        """The network of that role. ValueError if it is not a denoiser."""
        network = self.roles[role]
        if not isinstance(network, Denoiser):
            raise ValueError(f"discriminator heads and adapters are for denoisers, not for {type(network).__name__}")
        return network


@dataclass(frozen=True)
class Role(ABC):
    """How one network is made. The engine uses only the interface of this class, never the type of a role."""

    @property
    def needs(self) -> str | None:
        """The role that must exist before this one; None: it needs no other."""
        return None

    @property
    def origin(self) -> str | None:
        """The role whose weights it starts with; None: its weights are its own."""
        return None

    @property
    def source(self) -> ModelSource | None:
        """Another model that the run must load for it."""
        return None

    @property
    def trainable(self) -> bool:
        """Whether an update may train it."""
        return True

    @property
    def stills(self) -> bool:
        """Whether it and its copies see single frames, noised on a path of their own; else what the run's model sees."""
        return False

    @property
    def reads(self) -> tuple[int, ...]:
        """Blocks of the network that it `needs` whose features it reads; negative numbers count from the end."""
        return ()

    def check(self, lora: Lora | None) -> None:  # noqa: B027 - most roles exist with adapters and without
        """Refuse (ValueError) a run with whole networks (`lora` None), or with these adapters, if the role cannot be made."""

    @abstractmethod
    def make(self, name: str, making: Making) -> nn.Module:
        """Make the network of the role `name`."""


@dataclass(frozen=True)
class Copy(Role):
    """A role that starts as an independent copy of another role's weights."""

    of: str = "teacher"
    frozen: bool = False
    """Whether it stays what `of` was when the run began."""

    @property
    def needs(self) -> str:
        return self.of

    @property
    def origin(self) -> str:
        return self.of

    @property
    def trainable(self) -> bool:
        return not self.frozen

    def make(self, name: str, making: Making) -> nn.Module:
        """A copy; with `lora`, adapters over the frozen network instead.

        Adapters of one role's copies draw the same A, so they start equal, like copies of whole networks.
        """
        if making.lora is None or adapters(making.roles[self.of]):
            return duplicate(making.roles[self.of])
        return adapt(making.denoiser(self.of), making.lora, Rng(making.seed).fold(f"lora/{self.of}"))


@dataclass(frozen=True)
class Heads(Role):
    """A new network: discriminator heads of the kind `head` on features of `of` at `layers` (negative numbers count from the
    end). They read the features of so many `views` of a clip side by side.
    """

    of: str = "teacher"
    layers: tuple[int, ...] = (-1,)
    head: Head = "separate"
    views: int = 1

    @property
    def needs(self) -> str:
        return self.of

    @property
    def reads(self) -> tuple[int, ...]:
        return self.layers

    def make(self, name: str, making: Making) -> nn.Module:
        eyes = making.denoiser(self.of)
        widths = eyes.backbone.widths
        require_blocks(self.layers, len(widths))
        seen = [self.views * widths[layer] for layer in self.layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(making.seed)
            heads = self._network(seen)
        return heads.to(making.device or next(eyes.parameters()).device)

    def _network(self, widths: list[int]) -> nn.Module:
        match self.head:
            case "separate":
                return FeatureHeads(widths, self.layers)
            case "joint":
                return JointHead(widths)
            case "block":
                return BlockHead(widths)
        return QueryHead(widths, framewise=self.head == "frames")


@dataclass(frozen=True)
class Weak(Role):
    """A view of the role `of`, whose adapters count `scale` times: between the teacher (0) and that role (1).

    It has no weights of its own. A run without adapters refuses it.
    """

    of: str
    scale: float

    @property
    def needs(self) -> str:
        return self.of

    @property
    def origin(self) -> str:
        return self.of

    @property
    def trainable(self) -> bool:
        return False

    def check(self, lora: Lora | None) -> None:
        if lora is None:
            raise ValueError(
                "a weakened network needs adapters, and this run has none; set settings.lora, or method.scorers.weak: 0"
            )

    def make(self, name: str, making: Making) -> nn.Module:
        return weaken(making.denoiser(self.of), self.scale)


@dataclass(frozen=True)
class Other(Role):
    """The denoiser of another model of any size, which must use the same latents and text states."""

    model: ModelSource
    frozen: bool = True
    """Whether it stays what that model is; else it is trained."""
    stills: bool = False

    @property
    def source(self) -> ModelSource:
        return self.model

    @property
    def trainable(self) -> bool:
        return not self.frozen

    def make(self, name: str, making: Making) -> nn.Module:
        """The network itself; if it is trained with `lora`, adapters over it."""
        network = making.others[name].denoiser
        if self.frozen or making.lora is None:
            return network
        return adapt(network, making.lora, Rng(making.seed).fold(f"lora/{name}"))


@dataclass(frozen=True)
class Decoder(Role):
    """A frozen role: a copy of the autoencoder of the run's model, for what is judged by its frames."""

    @property
    def trainable(self) -> bool:
        return False

    def make(self, name: str, making: Making) -> nn.Module:
        if making.codec is None:
            raise ValueError(
                f"the role {name!r} decodes clips, and this model has no autoencoder; take a model with a codec"
            )
        return copy.deepcopy(making.codec)


@dataclass(frozen=True)
class Judge(Role):
    """A frozen role: the clip encoder of another model, which reads what a clip shows."""

    model: str
    """Folder of a model with a `features` network, or `world/features`."""

    @property
    def trainable(self) -> bool:
        return False

    def make(self, name: str, making: Making) -> nn.Module:
        encoder = VideoModel.from_pretrained(self.model).part("features")
        return encoder if making.device is None else encoder.to(making.device)


def require_blocks(layers: Sequence[int], count: int) -> None:
    """Refuse (ValueError) layers that a network of so many blocks does not have."""
    if not all(-count <= layer < count for layer in layers):
        raise ValueError(f"layers must be from -{count} to {count - 1}, the blocks of this network; got {list(layers)}")


ROLES = (Copy, Heads, Weak, Other, Decoder, Judge)
