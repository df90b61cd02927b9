"""A backbone with its noise path and kind of prediction: the only kind of network a method sees."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.attention import KVCache
from fewstep.attention.forward_mode import forward_mode
from fewstep.core import Call, Cond, KVView
from fewstep.diffusion.path import NoisePath
from fewstep.diffusion.prediction import KINDS, Kind, Prediction, Tangent
from fewstep.models.backbone import Backbone


class Predictor(Protocol):
    """What a method sees of a denoiser: a `Denoiser`, or a run's view of one."""

    @property
    def path(self) -> NoisePath: ...

    @property
    def kind(self) -> Kind: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = ..., /) -> Prediction: ...

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = ..., /
    ) -> list[Tensor]: ...

    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor, call: Call = ..., /
    ) -> tuple[Prediction, Tangent]: ...

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = ..., /) -> KVView: ...


class Denoiser(nn.Module):
    """Latents `[B, C, F, H, W]` at time `[B]` or `[B, F]` in, a `Prediction` out."""

    rounded: bool = False
    """Whether the matrices of the blocks are kept as bfloat16, and multiplied so (`runtime.typed`)."""

    def __init__(self, backbone: Backbone, path: NoisePath, kind: Kind) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"prediction kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        self.backbone, self.path, self.kind = backbone, path, kind

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        """With a view of the past (`call.kv`) the prediction also carries this call's keys and values, to be committed."""
        with self._arithmetic(x_t):
            out = self.backbone(x_t.to(self.backbone.dtype or x_t.dtype), t, cond, call)
        return Prediction(out.raw.to(x_t.dtype), self.kind, x_t, t, self.path, out.kv)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = Call()) -> list[Tensor]:
        """Tokens after the blocks `layers` (negative counts from the end), each `[B, width, F, h, w]`.

        Nothing after the deepest of them is computed; gradients flow to `x_t`.
        """
        depth = len(self.backbone.blocks)
        wanted = [layer + depth if layer < 0 else layer for layer in layers]
        if not wanted or not all(0 <= layer < depth for layer in wanted):
            raise ValueError(f"layers must be a non-empty list in [-{depth}, {depth - 1}], got {list(layers)}")
        with self._arithmetic(x_t):
            states = islice(self.backbone.walk(self.backbone.embed(x_t, t, cond, call), call), max(wanted) + 1)
            volumes = {layer: state.volume for layer, state in enumerate(states) if layer in wanted}
        return [volumes[layer] for layer in wanted]

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        """What calls like `call` on latents like `x_t`, which come next, may read of a memory. Make it once for all calls of
        a chunk.
        """
        return self.backbone.recall(memory, x_t, call)

    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor, call: Call = Call()
    ) -> tuple[Prediction, Tangent]:
        """The prediction, and its derivative along `(dx, dt)`, which carries no gradient.

        Where gradients are recorded the prediction is a call of its own: nothing of the derivative is kept for the backward
        pass, and the prediction is made as always (compiled, checkpointed, sharded).
        """
        if call.shared is not None:
            raise ValueError("processes that share a clip have no forward-mode derivatives; set parallel.sequence: 1")
        apart = torch.is_grad_enabled() or call.kv is not None
        prediction = self.forward(x_t, t, cond, call) if apart else None
        eager = torch.compiler.set_stance("force_eager")  # compiled blocks know no forward-mode derivatives
        with torch.no_grad(), forward_ad.dual_level(), forward_mode(), eager, self._arithmetic(x_t):
            moving = forward_ad.make_dual(x_t, dx), forward_ad.make_dual(t, dt)
            raw, slope = forward_ad.unpack_dual(self.backbone(*moving, cond, call).raw.to(x_t.dtype))
            slope = torch.zeros_like(raw) if slope is None else slope
        prediction = prediction or Prediction(raw, self.kind, x_t, t, self.path)
        return prediction, Tangent(slope, dx, dt, prediction)

    def _arithmetic(self, x_t: Tensor) -> AbstractContextManager[Any]:
        if not self.rounded:
            return nullcontext()
        return torch.autocast(x_t.device.type, torch.bfloat16, cache_enabled=False)
