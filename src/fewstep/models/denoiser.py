"""A backbone that knows its noise path and what it predicts: the only kind of network a method ever sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from fewstep.attention import KVCache, math_only
from fewstep.core import Call, Cond, KVView
from fewstep.diffusion.path import NoisePath
from fewstep.diffusion.prediction import KINDS, Kind, Prediction
from fewstep.models.backbone import Backbone


class Denoiser(nn.Module):
    """Latents `[B, C, F, H, W]` at time `[B]` or `[B, F]` in, a `Prediction` out."""

    def __init__(self, backbone: Backbone, path: NoisePath, kind: Kind) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"prediction kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
        self.backbone, self.path, self.kind = backbone, path, kind

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        """With a view of the past (`call.kv`) the prediction also carries this call's keys and values, to be committed."""
        out = self.backbone(x_t, t, cond, call)
        return Prediction(out.raw.to(x_t.dtype), self.kind, x_t, t, self.path, out.kv)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = Call()) -> list[Tensor]:
        """Tokens after the blocks `layers` (negative counts from the end), each `[B, width, F, h, w]`.

        Nothing after the deepest of them is computed; gradients flow to `x_t`.
        """
        depth = len(self.backbone.blocks)
        wanted = [layer + depth if layer < 0 else layer for layer in layers]
        if not wanted or not all(0 <= layer < depth for layer in wanted):
            raise ValueError(f"layers must be a non-empty list in [-{depth}, {depth - 1}], got {list(layers)}")
        states = islice(self.backbone.walk(self.backbone.embed(x_t, t, cond, call), call), max(wanted) + 1)
        volumes = {layer: state.volume for layer, state in enumerate(states) if layer in wanted}
        return [volumes[layer] for layer in wanted]

    def recall(self, memory: KVCache, x_t: Tensor) -> KVView:
        """What calls on latents like `x_t`, which come next, may read of a memory. Make it once for all calls of a chunk."""
        return self.backbone.recall(memory, x_t)

    def jvp(self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor) -> tuple[Prediction, Prediction]:
        """The prediction, and one whose `raw` is its derivative along `(dx, dt)`; that one's views mean nothing."""
        if self.backbone.shared is not None:
            raise ValueError("processes that share a clip have no forward-mode derivatives; set parallel.sequence: 1")

        def raw(x: Tensor, t: Tensor) -> Tensor:
            return self.backbone(x, t, cond).raw

        with math_only(), torch.compiler.set_stance("force_eager"):  # compiled blocks know no forward-mode derivatives
            primal, tangent = torch.func.jvp(raw, (x_t, t), (dx, dt))  # type: ignore[misc]
        prediction = Prediction(primal.to(x_t.dtype), self.kind, x_t, t, self.path)
        return prediction, prediction.with_raw(tangent.to(x_t.dtype))
