"""How LTX's authors sample their models, and their licences.

github.com/Lightricks/LTX-Video: configs/ltxv-2b-0.9.1.yaml, ltxv-2b-0.9.5.yaml and ltxv-13b-0.9.7-dev.yaml (steps, guidance,
STG, decoder), README.md (News: licences of 0.9.5 and 0.9.6, 1216 x 704 at 30 fps from 0.9.6 on). The 2B models are sampled as
there. For 13B, guidance that changes with time and the second pass at a larger size are left out.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.diffusion import CFG, STG, Contract
from fewstep.models.adapters.layout import Layout
from fewstep.models.adapters.presets.facts import Preset
from fewstep.models.card import Card

_LARGE_LAYERS = 48
"""Blocks of the 13B models, which begin with 0.9.7. The 2B models have 28; later than 0.9.1 only 0.9.5 is a layout."""
_NEW_SIZE = {"num_frames": 121, "height": 704, "width": 1216, "fps": 30}
_SMALL_STEPS, _LARGE_STEPS = 40, 30
_GUIDANCE = STG(scale=3.0, stg_scale=1.0, blocks=(19,), rescale=0.7)
_LARGE_GUIDANCE = (
    "spatiotemporal guidance, guidance that changes with time (1 to 8), and the second pass at a larger size"
)


def licence_of(later: bool, layers: int) -> str:
    """The licence of a layout: `later` than 0.9.1, with so many blocks."""
    if not later:
        return "LTX-Video 2B 0.9 licence (RAIL-M)"
    return "LTX-Video Open Weights License" if layers >= _LARGE_LAYERS else "LTX-Video 2B 0.9.5 licence (OpenRAIL-M)"


def authors(layout: Layout, card: Card) -> Preset:
    """The preset `authors`. What it leaves out is named in the card."""
    large = layout.config("transformer")["num_layers"] >= _LARGE_LAYERS
    steps = _LARGE_STEPS if large else _SMALL_STEPS

    def contract(own: Contract) -> Contract:
        return replace(own, steps=steps, guidance=CFG(scale=3.0) if large else _GUIDANCE)

    small = "ltxv-2b-0.9.1" if layout.index["_class_name"] == "LTXPipeline" else "ltxv-2b-0.9.5"
    return Preset(
        contract=contract,
        source=f"github.com/Lightricks/LTX-Video configs/{'ltxv-13b-0.9.7-dev' if large else small}.yaml",
        fields=_NEW_SIZE if large else {},
        missing=_LARGE_GUIDANCE if large else "",
    )
