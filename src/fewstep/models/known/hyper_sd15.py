"""Hyper-SD (2404.13686) for Stable Diffusion 1.5: a LoRA for each of 1, 2, 4 and 8 steps.

DDIM over trailing timesteps without guidance (`guidance_scale=0` in diffusers). The scheduler of Stable Diffusion 1.5 ends at the
first level of its table, not at clean latents, and so does this. The LoRAs that keep guidance (CFG in their names) are not meant.
"""

from fewstep.diffusion import CFG, DDIM, Contract, Timesteps, Trained
from fewstep.models.known.system import SCALED_LINEAR, Known

HYPER_SD15 = Known(
    name="hyper-sd15",
    what="Stable Diffusion 1.5 in 1, 2, 4 or 8 steps: LoRAs of Hyper-SD, a file for each step count; an image model",
    source="ByteDance/Hyper-SD",
    bases=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    network="StableDiffusion",
    holds="lora",
    files=r"hyper-?sd(v?1\.?5|15)(?!.*cfg)",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(
        grid=Trained(grid=Timesteps(spacing="trailing", ends_clean=False), steps=(1, 2, 4, 8)),
        sampler=DDIM(), steps=4, guidance=CFG(scale=1.0),
    ),
    per_file=True,
    licence="openrail++",
    facts={
        "files, licence": "huggingface.co/ByteDance/Hyper-SD/tree/a08b9c3da8dc3be0a6e79b04721bf237241403f9",
        "times, solver": "huggingface.co/ByteDance/Hyper-SD README.md (DDIMScheduler, trailing, guidance_scale 0)",
        "paper": "arxiv.org/abs/2404.13686",
    },
    unverified="the settings were read in public code that follows the page, not on the page itself. In one step its authors use "
    "TCDScheduler with eta 1, which ends at the same level after one step",
)  # fmt: skip
