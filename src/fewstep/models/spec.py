"""Description of a network that is not built yet: its class name and constructor arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewstep.attention import PATTERNS
from fewstep.core.build import At, Names, build, build_arguments, dump, parameters, type_name
from fewstep.models.networks import network_class


@dataclass(frozen=True)
class Spec:
    """`Spec.of(network).build()` has the same shape and fresh weights.

    >>> Spec("TextEncoder", {"width": 64}).build().width
    64
    """

    type: str
    """Class name, of `networks.NETWORKS` or `networks.ADAPTED`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that differ from the defaults, or all of them."""

    @classmethod
    def from_tree(cls, tree: Any, names: Names, at: At) -> Spec:
        """From `{type: VideoDiT, width: 192}`. Arguments are checked and those left out are written out."""
        flat = build(dict[str, Any], tree, names, at)
        network = network_class(flat.pop("type", None), at.key("type"))
        nested = flat["args"] if set(flat) == {"args"} else flat
        known = build_arguments(network, nested, {c.__name__: c for c in PATTERNS}, at)
        return cls(
            type_name(network), {p.name: dump(known.get(p.name, p.default), p.type) for p in parameters(network)}
        )

    def to_tree(self) -> dict[str, Any]:
        return {"type": self.type, **self.args}

    @staticmethod
    def of(network: nn.Module) -> Spec:
        """The spec of an existing network, all arguments written out."""
        return Spec(type_name(type(network)), dict(network.args))

    def build(self) -> nn.Module:
        """Allocate the network. RecipeError names an unknown class or argument and the nearest known one."""
        network, at = network_class(self.type, At("network", "type")), At("network", self.type)
        arguments = build_arguments(network, self.args, {c.__name__: c for c in PATTERNS}, at)
        try:
            return network(**arguments)
        except ValueError as error:
            raise at.refuse(error) from error


DIFFUSERS_NAMES = {"denoiser": "transformer or unet", "text": "text_encoder", "image": "image_encoder", "codec": "vae"}
"""What diffusers calls the parts of a model."""


def lacking(part: str, have: Iterable[str]) -> str:
    """That a model has no such part, with the names that diffusers gives it and the others."""
    return f"has no {_told(part)}, only {', '.join(map(_told, have)) or 'nothing'}"


def _told(part: str) -> str:
    return f"{part} ({DIFFUSERS_NAMES[part]} in diffusers)" if part in DIFFUSERS_NAMES else part
