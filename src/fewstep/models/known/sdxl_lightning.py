"""SDXL-Lightning (2402.13929): SDXL in 1, 2, 4 or 8 Euler steps over trailing timesteps, no guidance.

The 1-step file predicts x0, the others eps: read as eps, it makes noise. SDXL is not read here.
"""

from fewstep.diffusion import CFG, DDIM, Contract, Timesteps, Trained
from fewstep.models.known.system import SCALED_LINEAR, Known

SDXL_LIGHTNING = Known(
    name="sdxl-lightning",
    what="SDXL in 1, 2, 4 or 8 steps: U-Nets and LoRAs of SDXL-Lightning; an image model",
    source="ByteDance/SDXL-Lightning",
    bases=("stabilityai/stable-diffusion-xl-base-1.0",),
    network="StableDiffusion",
    holds="lora",
    files=r"sdxl[-_]lightning",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(
        grid=Trained(grid=Timesteps(spacing="trailing"), steps=(1, 2, 4, 8)),
        sampler=DDIM(),
        steps=4,
        guidance=CFG(scale=1.0),
    ),
    per_file=True,
    licence="openrail++",
    facts={
        "files, licence, base": "huggingface.co/ByteDance/SDXL-Lightning/blob/dd8c2216059e9d3096313bfcb53bdfff80f70c77/README.md",
        "paper": "arxiv.org/abs/2402.13929",
    },
    unverified="trailing Euler steps and the x0 prediction of the 1-step file are from the names of the files and public code",
    missing="a network for SDXL, which reads a second text encoder and the size of the image",
)
