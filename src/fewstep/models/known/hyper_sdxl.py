"""Hyper-SD (2404.13686) for SDXL: LoRAs for 1 (unified, timestep 800), 2, 4 and 8 steps. SDXL is not read here."""

from fewstep.diffusion import CFG, DDIM, Contract, Timesteps, Trained
from fewstep.models.known.system import SCALED_LINEAR, Known

HYPER_SDXL = Known(
    name="hyper-sdxl",
    what="SDXL in 1, 2, 4 or 8 steps: LoRAs and a U-Net of Hyper-SD; an image model",
    source="ByteDance/Hyper-SD",
    bases=("stabilityai/stable-diffusion-xl-base-1.0",),
    network="StableDiffusion",
    holds="lora",
    files=r"hyper-?sdxl",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(
        grid=Trained(grid=Timesteps(spacing="trailing"), steps=(2, 4, 8)),
        sampler=DDIM(),
        steps=4,
        guidance=CFG(scale=1.0),
    ),
    per_file=True,
    licence="openrail++",
    facts={
        "files, licence": "huggingface.co/ByteDance/Hyper-SD/tree/a08b9c3da8dc3be0a6e79b04721bf237241403f9",
        "paper": "arxiv.org/abs/2404.13686",
    },
    unverified="times and solver, as for hyper-sd15",
    missing="a network for SDXL, which reads a second text encoder and the size of the image",
)
