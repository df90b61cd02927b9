"""Spatiotemporal guidance: away from what the network makes when one of its blocks does not mix tokens, as in LTX-Video."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.core import Call, Cond
from fewstep.core.bounds import Amount, Fraction, Natural, require_bounds
from fewstep.diffusion.guidance import CFG, Calls, Net
from fewstep.diffusion.path import broadcast
from fewstep.diffusion.prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class STG(CFG):
    """CFG plus spatiotemporal guidance (2411.18664), as LTX-Video's authors sample their 2B models.

        1  perturbed = the network for the prompt, with `blocks` unmixed: self-attention gives each token its own values
        2  raw = uncond + scale (cond - uncond) + stg_scale (cond - perturbed)
        3  raw = raw (rescale std(cond) / std(raw) + 1 - rescale), with the standard deviations of each clip

    github.com/Lightricks/LTX-Video: configs/ltxv-2b-0.9.5.yaml (the defaults here; `stg_mode: attention_values`),
    ltx_video/pipelines/pipeline_ltx_video.py (lines 2 and 3) and models/transformers/attention.py (line 1). The interval
    `[low, high]` and `outside` are for `scale` alone. Line 1 is a call of its own, so a step takes three, and two where `scale`
    is 1.
    """

    stg_scale: Amount = 1.0
    """Strength; 0: CFG alone, without line 3."""
    blocks: tuple[Natural, ...] = (19,)
    """Blocks that do not mix tokens, counted from 0."""
    rescale: Fraction = 0.7
    """How far the result's standard deviation is brought back to that of `cond`; 0: not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bounds(self, "STG")
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"STG needs at least one block, each named once, got blocks {list(self.blocks)}")

    @property
    def active(self) -> bool:
        return self.guided or self.stg_scale > 0

    @property
    def passes(self) -> int:
        return super().passes + (self.stg_scale > 0)

    def __call__(
        self, net: Net, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, call: Call = Call(), *, calls: Calls = "one"
    ) -> Prediction:
        """As `CFG`'s, with one more pass of B. ValueError for a call with a past."""
        if self.stg_scale == 0:
            return super().__call__(net, x_t, t, cond, uncond, call, calls=calls)
        if call.kv is not None:
            raise ValueError("spatiotemporal guidance is for whole clips, not for streams; use guidance of type CFG")
        guided, raw_cond = self.beside(net, x_t, t, cond, uncond, call, calls)
        perturbed = net(x_t, t, cond, replace(call, branch="perturbed", unmixed=self.blocks)).raw  # 1
        raw = guided.raw + self.stg_scale * (raw_cond - perturbed)  # 2
        ratio = raw_cond.flatten(1).std(1) / raw.flatten(1).std(1)
        return replace(guided, raw=raw * broadcast(self.rescale * ratio + 1 - self.rescale, x_t))  # 3
