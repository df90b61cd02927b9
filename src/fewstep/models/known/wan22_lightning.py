"""Wan2.2-Lightning and the distilled LoRAs of LightX2V for Wan 2.2 A14B: a LoRA for each of the two experts.

Four Euler steps without guidance at 1000, 937.5, 833.3, 625: the steps 1000, 750, 500, 250 of a uniform grid under shift 5. At
a boundary of 0.875 (text-to-video) or 0.9 (image-to-video) the first two belong to the expert for noisy times. The first
files have `alpha` 8 for rank 64: read without it, they are eight times too strong.
"""

from fewstep.diffusion import CFG, Contract, Euler, Shifted, Trained
from fewstep.models.known.system import Known

WAN22_LIGHTNING = Known(
    name="wan22-lightning",
    what="Wan 2.2 A14B in 4 steps: LoRAs of LightX2V for both experts, text-to-video and image-to-video",
    source="lightx2v/Wan2.2-Lightning",
    bases=("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    network="WanExperts",
    holds="lora",
    files=r"wan-?2\.?2.*(lightning|4-?steps?|lightx2v)",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Euler(), steps=4, guidance=CFG(scale=1.0)
    ),
    licence="Apache-2.0",
    facts={
        "times": "maintainer in github.com/ModelTC/LightX2V-Wan2.2-Lightning issue 3; shift and step list in github.com/"
        "ModelTC/LightX2V configs/distill/wan22/wan_moe_t2v_distill_lora.json",
        "solver": "github.com/ModelTC/LightX2V lightx2v/models/schedulers/wan/step_distill/scheduler.py "
        "(Wan22StepDistillScheduler)",
        "guidance, licence": "github.com/ModelTC/Wan2.2-Lightning README.md (no CFG; Apache 2.0)",
        "files, alpha": "github.com/huggingface/diffusers pull request 12074; github.com/deepbeepmeep/Wan2GP issue 677 (0.125)",
    },
)
