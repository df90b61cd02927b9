"""DMD2 (2405.14867): SDXL in 4 steps at 999, 749, 499, 249, or in one step at timestep 399, where the network sees pure noise.

x0 and fresh noise in between, no guidance (`guidance_scale=0` in diffusers). Non-commercial. SDXL is not read here.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.system import SCALED_LINEAR, Known, listed

DMD2_SDXL = Known(
    name="dmd2-sdxl",
    what="SDXL in 4 steps or in 1: U-Nets and a LoRA of DMD2; an image model, not for commercial use",
    source="tianweiy/DMD2",
    bases=("stabilityai/stable-diffusion-xl-base-1.0",),
    network="StableDiffusion",
    holds="weights",
    files=r"dmd2",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(grid=listed(1.0, 0.75, 0.5, 0.25), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0)),
    licence="CC BY-NC-SA 4.0",
    facts={"solver, guidance, one step, licence": "github.com/tianweiy/DMD2 README.md"},
    unverified="with LCMScheduler's own timesteps the second and fourth are 759 and 259; the page of the weights has 749 and 249",
    missing="a network for SDXL, which reads a second text encoder and the size of the image",
)
