"""How CogVideoX's authors sample their models.

github.com/THUDM/CogVideo, inference/cli_demo.py: timesteps are `trailing`, 50 steps, guidance 6; CogVideoXDDIMScheduler with
constant guidance for the 2B model, CogVideoXDPMScheduler with `use_dynamic_cfg` for the 5B models.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.diffusion import CFG, Contract, DynamicCFG, FixedStride, SDEDPMpp2M, Timesteps
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.presets.facts import Preset
from fewstep.models.card import Card


def authors(layout: Layout, card: Card) -> Preset:
    """The preset `authors`."""
    large = layout.config("transformer")["use_rotary_positional_embeddings"]

    def contract(own: Contract) -> Contract:
        total = layout.scheduler()["num_train_timesteps"]
        grid = Timesteps(spacing="trailing", num_train_timesteps=total)
        if large:
            guidance: CFG = DynamicCFG(scale=6.0, counts="timesteps", num_train_timesteps=total)
            return replace(own, sampler=SDEDPMpp2M(stride=total), grid=grid, steps=50, guidance=guidance)
        return replace(
            own, sampler=FixedStride(num_train_timesteps=total), grid=grid, steps=50, guidance=CFG(scale=6.0)
        )

    return Preset(contract=contract, source="github.com/THUDM/CogVideo inference/cli_demo.py")
