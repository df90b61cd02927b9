"""LTX-Video 0.9.7 and 0.9.8 distilled (2B and 13B): 7 Euler steps at listed times, no guidance.

This is the first pass of its authors, at their small size. The second pass over upscaled latents needs an upscaler, which is not
read here.
"""

from fewstep.diffusion import CFG, Contract, Euler
from fewstep.models.known.system import Known, listed

LTX_DISTILLED = Known(
    name="ltx-distilled",
    what="LTX-Video 0.9.7 and 0.9.8, distilled, in 7 steps: the first pass, without the upscaler",
    source="Lightricks/LTX-Video-0.9.8-13B-distilled",
    bases=("Lightricks/LTX-Video-0.9.8-13B-distilled", "Lightricks/LTX-Video-0.9.7-distilled"),
    network="LTX",
    holds="weights",
    files=r"ltxv?-?(video)?.*0\.9\.[78].*distilled(?!.*(lora|fp8))",
    contract=Contract(
        grid=listed(1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725),
        sampler=Euler(),
        steps=7,
        guidance=CFG(scale=1.0),
    ),
    licence="LTX-Video Open Weights License",
    facts={
        "times, solver, guidance": "github.com/Lightricks/LTX-Video configs/ltxv-13b-0.9.8-distilled.yaml, "
        "configs/ltxv-2b-0.9.8-distilled.yaml",
        "0.9.7": "github.com/huggingface/diffusers docs/source/en/api/pipelines/ltx_video.md",
        "licence": "github.com/Lightricks/LTX-Video README.md (OpenRail-M since 0.9.5)",
    },
    unverified="diffusers' documentation rounds the times to whole timesteps and adds an eighth at 0.03, where nothing is left "
    "to do; the authors' seven were taken. 0.9.6 distilled is sampled otherwise and is not meant",
)
