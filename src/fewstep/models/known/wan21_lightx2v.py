"""The step and guidance distilled LoRAs of LightX2V for Wan 2.1 14B.

Four Euler steps without guidance, steps 1000, 750, 500, 250 of a uniform grid under shift 5. Their files also hold differences
of biases and norms (`diff_b`, `diff`), which belong to the student.
"""

from fewstep.diffusion import CFG, Contract, Euler, Shifted, Trained
from fewstep.models.known.system import Known

WAN21_LIGHTX2V = Known(
    name="wan21-lightx2v",
    what="Wan 2.1 14B in 4 steps: a LoRA of LightX2V, text-to-video and image-to-video",
    source="lightx2v/Wan2.1-Distill-Loras",
    bases=("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    network="Wan",
    holds="lora",
    files=r"wan-?2\.?1.*lightx2v|lightx2v.*14b.*(cfg|step)_?.*distill|wan-?2\.?1-distill-loras",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Euler(), steps=4, guidance=CFG(scale=1.0)
    ),
    licence="Apache-2.0",
    facts={
        "times": "github.com/ModelTC/LightX2V configs/distill/wan21/wan_t2v_distill_lora_4step_cfg.json (shift 5, list, no CFG)",
        "solver": "github.com/ModelTC/LightX2V lightx2v/models/schedulers/wan/step_distill/scheduler.py",
        "key names": "github.com/ModelTC/LightX2V lightx2v/utils/lora_loader.py; github.com/huggingface/diffusers pull "
        "request 12040",
        "licence": "github.com/ModelTC/LightX2V LICENSE",
    },
    unverified="the licence of the weights' own page; that of the repository was taken",
)
