"""Checks for training: features, derivatives, precision, checkpointing, saving and loading."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from fewstep.core import Call, Cond
from fewstep.evaluate.conformance.subject import Fault, Measured, NotApplicable, Subject, relative, worst
from fewstep.models import Denoiser, VideoModel
from fewstep.models.spread import Spread

_COPIED = 500_000_000
"""Parameters of the largest network that is copied into float64."""


class _Closed(nn.Module):
    """A block that must not be called."""

    def forward(self, state: object) -> object:
        raise Fault("blocks behind the last requested layer are computed")


def features(s: Subject) -> Measured:
    """There is one feature map per requested layer, of the stated width. Gradients flow to x_t. No block behind the last
    requested layer is computed. The head applied to the last block's state gives the output.

    Look at `widths` and at `volume` of the backbone's state (`[B, width, F, h, w]`), and for a `detach` or `no_grad` in
    `embed` or a block.
    """
    depth = len(s.backbone.blocks)
    middle = (depth - 1) // 2
    layers = sorted({0, middle, depth - 1})
    with torch.enable_grad():
        x = s.x_t.clone().requires_grad_()
        volumes = s.network.features(x, s.t, s.cond, layers)
        for layer, volume in zip(layers, volumes, strict=True):
            expected = (2, s.backbone.widths[layer], s.shape[1] // s.backbone.patch_frames)
            if volume.shape[:3] != expected or volume.ndim != 5:
                raise Fault(f"layer {layer} has the shape {tuple(volume.shape)}; it should begin with {expected}")
            reached = torch.autograd.grad(volume.square().sum(), x, retain_graph=True, allow_unused=True)[0]
            if reached is None or not reached.any():
                raise Fault(f"no gradient flows from layer {layer} to x_t")
    closed = nn.ModuleList([*s.backbone.blocks[: middle + 1], *(_Closed() for _ in range(depth - middle - 1))])
    short = s.twin(blocks=closed).features(s.x_t, s.t, s.cond, [middle])[0]
    *_, last = s.backbone.walk(s.backbone.embed(s.x_t, s.t, s.cond))
    whole = s.backbone.head(last.joined), s.network(s.x_t, s.t, s.cond).raw
    return Measured(worst([(short, volumes[layers.index(middle)].detach()), whole]), s.tolerance)


def jvp(s: Subject) -> Measured:
    """Derivatives along x_t and along t equal finite differences.

    Something is cut from the graph (`detach`, integer timesteps, a table look-up) or computed in low precision. If only the
    derivative along t is wrong, look at the time features. Only continuous-time consistency methods need these derivatives.
    """
    s.require("features")
    network = _in_float64(s)
    kind = s.dtype if network is None else torch.float64
    x, t, cond = s.x_t[:1].to(kind), s.t[:1].to(kind), _to(s.cond[:1], kind)
    step_x, step_t, bound = (
        (1e-2, 1e-4, 0.05) if kind == torch.float32 else (1e-3, 3e-5, 0.02)
    )  # time features are float32
    along_x = s.randn("dx", 1).to(kind), torch.zeros_like(t), step_x
    along_t = torch.zeros_like(x), torch.ones_like(t), step_t
    network = network or s.network
    pairs = []
    for dx, dt, h in (along_x, along_t):
        _, tangent = network.jvp(x, t, cond, dx, dt)
        ahead, behind = (network(x + e * dx, t + e * dt, cond).raw for e in (h, -h))
        pairs.append((tangent.raw, (ahead - behind) / (2 * h)))
    return Measured(worst(pairs), bound, f"along x_t {relative(*pairs[0]):.1e}, along t {relative(*pairs[1]):.1e}")


def bf16(s: Subject) -> Measured:
    """The output with bfloat16 autocast is close to the output in full precision.

    Something that needs float32 runs in bfloat16: time features (bfloat16 cannot hold 1000 t), modulation, norms, or the
    head. Put it into `autocast(enabled=False)`, as diffusers does with `_keep_in_fp32_modules`.
    """
    if s.dtype != torch.float32:
        raise NotApplicable("autocast does not change float64")
    exact = s.network(s.x_t, s.t, s.cond).raw
    with torch.autocast(s.x_t.device.type, torch.bfloat16):
        rough = s.network(s.x_t, s.t, s.cond).raw
    return Measured(relative(rough, exact), 0.05)


def checkpointing(s: Subject) -> Measured:
    """Output and gradients are the same with gradient checkpointing as without.

    A block is not a function of its state: it draws random numbers (dropout in train mode), stores something, or reads what
    another call stored.
    """
    s.require("features")
    weights = [p for p in s.backbone.blocks[0].parameters() if p.requires_grad]
    found = []
    with torch.enable_grad():
        for on in (False, True):
            x = s.x_t.clone().requires_grad_()
            raw = s.network(x, s.t, s.cond, Spread(checkpointing=on)(Call())).raw
            gradients = torch.autograd.grad(raw.square().mean(), [x, *weights])
            found.append((raw.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    return Measured(
        worst(list(zip(found[1], found[0], strict=True))),
        s.tolerance,
        "gradients of x_t and of the first block's weights",
    )


def saved(s: Subject) -> Measured:
    """After saving and loading, the output is the same.

    A weight is missing in `state_dict`, or a constructor argument is missing in `args`, so another network is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = VideoModel(s.model.card, {"denoiser": s.network}).save(Path(folder))
        loaded = VideoModel.from_pretrained(kept).denoiser.to(s.x_t.device, s.dtype)
    return Measured(relative(loaded(s.x_t, s.t, s.cond).raw, s.network(s.x_t, s.t, s.cond).raw), 0.01 * s.tolerance)


def _in_float64(s: Subject) -> Denoiser | None:
    """A copy in float64; None if the network is too large, or has parts that always run in float32."""
    if sum(p.numel() for p in s.network.parameters()) > _COPIED:
        return None
    network: Denoiser = copy.deepcopy(s.network).double()
    try:
        network(s.x_t[:1].double(), s.t[:1].double(), _to(s.cond[:1], torch.float64))
    except RuntimeError:
        return None
    return network


def _to(cond: Cond, dtype: torch.dtype) -> Cond:
    """Floating-point conditions in another precision."""
    return Cond(
        cond.text.to(dtype),
        cond.mask,
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.extra.items()},
        cond.framewise,
    )
