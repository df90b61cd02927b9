"""LCM-LoRA for Stable Diffusion 1.5 (2311.05556).

The file has kohya's names (`lora_unet_...`), with alphas and with convolutions. x0 and fresh noise at the timesteps of LCM; the
prediction is eps. Guidance is off: a scale between 1 and 2 is possible, and diffusers' `guidance_scale=0` and 1 both mean off.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.lcm_times import lcm_times
from fewstep.models.known.system import SCALED_LINEAR, Known

LCM_LORA_SD15 = Known(
    name="lcm-lora-sd15",
    what="Stable Diffusion 1.5 in 2 to 8 steps: the LCM-LoRA; an image model",
    source="latent-consistency/lcm-lora-sdv1-5",
    bases=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    network="StableDiffusion",
    holds="lora",
    files=r"lcm[-_]lora[-_]sd(v?1[-_.]?5|15)",
    path=SCALED_LINEAR,
    kind="eps",
    contract=Contract(grid=lcm_times(range(2, 9)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0)),
    licence="openrail++",
    facts={
        "times": "github.com/huggingface/diffusers src/diffusers/schedulers/scheduling_lcm.py (original_inference_steps 50)",
        "steps, guidance": "github.com/huggingface/diffusers docs/source/en/api/pipelines/latent_consistency_models.md",
        "key names": "github.com/huggingface/diffusers examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py",
    },
    unverified="the licence, which is on the page of the weights only; LCMScheduler mixes less than 3e-5 of x_t into x0, which "
    "is left out",
)
