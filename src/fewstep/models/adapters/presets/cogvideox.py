"""How CogVideoX's authors sample their models.

github.com/THUDM/CogVideo, inference/cli_demo.py: timesteps are `trailing`, 50 steps, guidance 6; CogVideoXDDIMScheduler with
constant guidance for the 2B model, CogVideoXDPMScheduler with `use_dynamic_cfg` for the 5B models.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.core import RecipeError
from fewstep.diffusion import CFG, Contract, FixedStride, Timesteps
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.presets.facts import Preset
from fewstep.models.card import Card


def authors(layout: Layout, card: Card) -> Preset:
    """The preset `authors`. RecipeError for the 5B models."""
    network = layout.config("transformer")
    if network["use_rotary_positional_embeddings"]:
        raise RecipeError(
            f"preset: authors: {card.name} is a CogVideoX 5B, which its authors sample with CogVideoXDPMScheduler, which draws "
            "noise between steps, and with guidance that changes from step to step; fewstep has neither. Leave the preset out "
            "(DDIM, constant guidance), or take layout"
        )

    def contract(own: Contract) -> Contract:
        total = layout.scheduler()["num_train_timesteps"]
        grid = Timesteps(spacing="trailing", num_train_timesteps=total)
        return replace(
            own, sampler=FixedStride(num_train_timesteps=total), grid=grid, steps=50, guidance=CFG(scale=6.0)
        )

    return Preset(contract=contract, source="github.com/THUDM/CogVideo inference/cli_demo.py")
