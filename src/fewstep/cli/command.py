"""The base class of all commands."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

Overrides = list[tuple[str, str]]


class UsageError(ValueError):
    """An invalid command line."""


def _said(default: str) -> str:
    return "" if default in ("", "''", "None", "False") else f"(default: {default})"


@dataclass(frozen=True)
class Command(ABC):
    """One sub-command: its fields are its options."""

    takes_overrides: ClassVar[bool] = False
    """Whether options such as `--method.critic-updates 3` change its recipe."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Print each default once: if it is None or empty, the option's own text explains it."""
        super().__init_subclass__(**options)
        own = inspect.get_annotations(cls)
        hint = arg(help_behavior_hint=_said)
        cls.__annotations__ = {k: v if str(v).startswith("ClassVar") else Annotated[v, hint] for k, v in own.items()}

    @abstractmethod
    def run(self, overrides: Overrides) -> int:
        """Run the command and return the exit code."""


@dataclass(frozen=True, kw_only=True)
class Loads(Command):
    """A command that loads a model."""

    trust: bool = False
    """Skip the check of weight files against the digests in their card. Faster, but damaged files go unnoticed."""


@dataclass(frozen=True, kw_only=True)
class Runs(Loads):
    """A command that runs a model. Copy of the fields of `fewstep.models.runtime.Runtime`, with `auto` where the machine
    decides: importing it would load torch just to print a help text."""

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic of the denoiser. bfloat16: its blocks compute in bfloat16 and take half the memory. float64: to tell rounding
    from mistakes. auto: float32 on a CPU, the type of the stored weights on a GPU."""
    device: str = "cpu"
    """Device for the networks, such as cpu or cuda. Processes on one machine share its devices."""
    compile: bool = False
    """Compile the denoiser's blocks: minutes at the first call, faster after."""
    offload: Literal["auto", "none", "model", "block"] = "auto"
    """What waits in the CPU's memory. model: all networks but the one that works. block: also the denoiser's blocks, which
    come to the device one after the other. auto: as little as the GPU's free memory asks for."""
    guidance_calls: Literal["auto", "one", "two"] = "auto"
    """Calls of the denoiser for one step with guidance. one: prompt and negative prompt as one batch. two: one after the other,
    in half the memory. auto: one, or two on a GPU whose free memory asks for it."""
    tiling: Literal["auto", "whole", "tiles", "chunks"] = "auto"
    """Decode clips whole, large frames in overlapping tiles, or one latent frame after the other. auto: as the model's card
    says."""
    attention: Literal["auto", "reference", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math"] = "auto"
    """Kernel of the denoiser's attention. auto: the fastest that fits. reference: exact products in float64, slow."""
