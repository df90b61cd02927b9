"""AnimateLCM (2402.00769): AnimateDiff in a few steps, motion modules and a LoRA for the image layers.

The folder holds diffusers' motion adapter (`diffusion_pytorch_model.safetensors`) and the LoRA
(`AnimateLCM_sd15_t2v_lora.safetensors`). Its base is a layout of AnimateDiffPipeline over Stable Diffusion 1.5 with the linear
table.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.lcm_times import lcm_times
from fewstep.models.known.system import LINEAR, Known

ANIMATELCM = Known(
    name="animatelcm",
    what="AnimateDiff in 4 to 8 steps: motion modules and a LoRA of AnimateLCM",
    source="wangfuyun/AnimateLCM",
    bases=("AnimateDiffPipeline over Stable Diffusion 1.5",),
    network="AnimateDiff",
    holds="motion",
    files=r"animatelcm(?!.*(svd|i2v))",
    path=LINEAR,
    kind="eps",
    contract=Contract(grid=lcm_times(range(4, 9)), sampler=Renoise(), steps=6, guidance=CFG(scale=1.5)),
    licence="MIT",
    facts={
        "steps, guidance": "github.com/G-U-N/AnimateLCM animatelcm_sd15/app.py (6 steps, 1.5); github.com/huggingface/diffusers "
        "docs/source/en/api/pipelines/animatediff.md",
        "table": "github.com/G-U-N/AnimateLCM animatelcm_sd15/configs/inference-t2v.yaml (linear)",
        "licence": "github.com/G-U-N/AnimateLCM LICENSE.txt",
    },
    unverified="its authors' configuration has original_inference_steps 100, and the documentation of diffusers leaves it at "
    "50: in 4 steps 0.75 and 0.25 in place of 0.76 and 0.26. Those of diffusers were taken, whose names of weights are read, "
    "too. diffusers also shows strength 0.8 of the LoRA; the authors' is 1",
)
