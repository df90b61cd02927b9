"""Adversarial losses: functions of a discriminator's logits `[B, heads]`, each with its equation.

Every loss is a mean over all logits, so that the weights of terms do not depend on batch size or number of heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.methods.targets import mse

Gan = Literal["softplus", "hinge", "relativistic"]


def generator(loss: Gan, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the student minimises, given logits of D `[B, heads]`. Mean over logits.

    softplus: `softplus(-D(fake))`, which does not saturate (1406.2661; 2405.14867, eq. 4). hinge: `-D(fake)`. relativistic:
    `softplus(-(D(fake) - D(real)))`, in pairs (1807.00734; 2506.09350).
    """
    match loss:
        case "softplus":
            return F.softplus(-fake).mean()
        case "hinge":
            return -fake.mean()
    assert real is not None, "the relativistic loss compares with real clips"
    return F.softplus(real - fake).mean()


def discriminator(loss: Gan, real: Tensor, fake: Tensor) -> Tensor:
    """What D minimises. Mean over logits. At logits 0 it is `2 log 2` (softplus), `2` (hinge) or `log 2` (relativistic)."""
    match loss:
        case "softplus":
            return F.softplus(-real).mean() + F.softplus(fake).mean()
        case "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(fake - real).mean()


def paired_generator(fake: Tensor, real: Tensor) -> Tensor:
    """Generator loss of pairs `mean (D(fake) - D(real))^2`. Mean over logits; no gradient where a pair is equal."""
    return mse(fake, real)


def paired_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss of pairs `mean (D(real) - D(fake) - 1)^2`. Mean over logits; only differences within a pair count."""
    return mse(real - fake, torch.ones_like(fake))


def approximate_r1(logits: Tensor, perturbed: Tensor) -> Tensor:
    """`mean (D(x) - D(x + rho n))^2` (2501.08316, eq. 3): about `rho^2 |grad D|^2`, without a second derivative.

    Perturb the real sample after adding noise, with the same t and eps; otherwise the difference measures the noise, not D.
    """
    return (logits - perturbed).square().mean()
