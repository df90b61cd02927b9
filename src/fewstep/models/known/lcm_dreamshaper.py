"""LCM_Dreamshaper_v7 (2310.04378): Stable Diffusion 1.5 as a latent consistency model.

Guidance is an input of the network: `time_cond_proj_dim` features of w, added to those of the time. Here w = guidance_scale - 1,
as in diffusers. With one scale for all clips that input is a constant, so it is added to the bias of the first layer, and the
student is a plain U-Net.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.lcm_times import lcm_times
from fewstep.models.known.system import SCALED_LINEAR, Known

LCM_DREAMSHAPER = Known(
    name="lcm-dreamshaper",
    what="Dreamshaper v7 (Stable Diffusion 1.5) in 1 to 8 steps: a latent consistency model that is told its "
    "guidance, 8.5; an image model",
    source="SimianLuo/LCM_Dreamshaper_v7",
    bases=("Lykon/dreamshaper-7",),
    network="StableDiffusion",
    holds="weights",
    files=r"lcm[-_]dreamshaper",
    keys=r"time_embedding\.cond_proj\.weight",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(grid=lcm_times(range(1, 9)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0)),
    guidance_input=8.5,
    licence="MIT",
    facts={
        "times": "github.com/huggingface/diffusers src/diffusers/schedulers/scheduling_lcm.py (original_inference_steps 50)",
        "guidance": "github.com/huggingface/diffusers src/diffusers/pipelines/latent_consistency_models/"
        "pipeline_latent_consistency_text2img.py (default 8.5; w = guidance_scale - 1)",
    },
    unverified="the licence, which is on the page of the weights only",
)
