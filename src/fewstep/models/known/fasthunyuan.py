"""FastHunyuan (FastVideo): HunyuanVideo in 6 Euler steps, shift 17, guidance 6 as an input of the network."""

from fewstep.diffusion import CFG, Contract, Euler, Shifted, Trained
from fewstep.models.known.system import Known

FASTHUNYUAN = Known(
    name="fasthunyuan",
    what="HunyuanVideo text-to-video in 6 steps, consistency distilled by FastVideo",
    source="FastVideo/FastHunyuan-diffusers",
    bases=("hunyuanvideo-community/HunyuanVideo",),
    network="HunyuanVideo",
    holds="weights",
    files=r"fast-?hunyuan",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=17.0), steps=(6,)), sampler=Euler(), steps=6, guidance=CFG(scale=1.0)
    ),
    size={"num_frames": 125, "height": 720, "width": 1280},
    licence="tencent-hunyuan-community",
    facts={
        "times, guidance, size": "github.com/hao-ai-lab/FastVideo scripts/inference/inference_fasthunyuan.yaml, "
        "fastvideo/configs/pipelines/hunyuan.py (FastHunyuanConfig), fastvideo/pipelines/basic/hunyuan/presets.py",
    },
    unverified="the licence: that of its base model was taken",
)
