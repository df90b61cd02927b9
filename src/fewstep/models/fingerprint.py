"""Fingerprint of a network in 12 characters: its class, arguments, transforms and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fewstep.compress import Transform
from fewstep.core import dump
from fewstep.models.denoiser import Denoiser
from fewstep.models.spec import Spec


def describe(part: nn.Module) -> Spec:
    """Class and constructor arguments of a network; of a denoiser: its backbone's."""
    if not isinstance(part, Denoiser):
        return Spec.of(part)
    return replace(Spec.of(part.backbone.named), args=dict(part.backbone.args))


def fingerprint(part: nn.Module) -> str:
    """12 hexadecimal characters that change when the class, its arguments, its transforms or any weight change."""
    return print_of(part, part.state_dict())


def print_of(
    part: nn.Module, tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype] = MappingProxyType({})
) -> str:
    """Fingerprint of a network with these `tensors`; `stored` are the types of the file that they will be read from."""
    digest = hashlib.blake2b(json.dumps(dump(describe(part)), sort_keys=True).encode(), digest_size=6)
    if isinstance(part, Denoiser) and part.backbone.transforms:
        changes = dump(part.backbone.transforms, tuple[Transform, ...])
        digest.update(json.dumps(changes, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]  # one at a time: they may be in a file
        value = value.to(stored.get(name, value.dtype)).to(value.dtype)
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()
