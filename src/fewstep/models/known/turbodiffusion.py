"""TurboDiffusion (2512.16093): rCM students of Wan 2.1 and 2.2 that were fine-tuned with sparse-linear attention (SLA).

Its attention has a linear branch with a learned projection (`attn_op.local_attn.proj_l`); dense attention computes something
else. Sampling is that of rCM, for image-to-video from sigma 200.
"""

from fewstep.diffusion import CFG, Angles, Contract, Renoise
from fewstep.models.known.system import Known

TURBODIFFUSION = Known(
    name="turbodiffusion",
    what="Wan 2.1 and Wan 2.2 I2V-A14B in 1 to 4 steps with sparse-linear attention: rCM with SLA by TurboDiffusion",
    source="TurboDiffusion/TurboWan2.1-T2V-1.3B-480P",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    network="Wan",
    holds="weights",
    files=r"turbo-?(wan|diffusion)",
    keys=r"local_attn\.proj_l",
    contract=Contract(grid=Angles(sigma_max=80.0), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0)),
    licence="Apache-2.0",
    facts={
        "times, solver": "github.com/thu-ml/TurboDiffusion turbodiffusion/inference/wan2.1_t2v_infer.py, wan2.2_i2v_infer.py",
        "attention": "github.com/thu-ml/TurboDiffusion turbodiffusion/inference/modify_model.py, README.md",
        "licence": "github.com/thu-ml/TurboDiffusion LICENSE",
    },
    missing="sparse-linear attention (SLA) with its projection proj_l",
)
