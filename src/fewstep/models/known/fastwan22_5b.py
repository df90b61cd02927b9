"""FastWan2.2-TI2V-5B-FullAttn (FastVideo): Wan 2.2 5B in 3 steps with dense attention, distilled with DMD.

It predicts x0 at 1000, 757, 522 and renoises in between. These are times themselves: its training script gives a shift, which
only concerns the critic's times, and no warping.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.system import Known, listed

FASTWAN22_5B = Known(
    name="fastwan22-5b",
    what="Wan 2.2 TI2V 5B in 3 steps, text-to-video, distilled with DMD by FastVideo; dense attention",
    source="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    bases=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    network="Wan",
    holds="weights",
    files=r"fastwan2\.?2.*fullattn",
    contract=Contract(grid=listed(1.0, 0.757, 0.522, shift=5.0), sampler=Renoise(), steps=3, guidance=CFG(scale=1.0)),
    licence="Apache-2.0",
    facts={
        "times": "github.com/hao-ai-lab/FastVideo examples/distill/Wan2.2-TI2V-5B-Diffusers/Data-free/distill_dmd_t2v_5B.sh, "
        "fastvideo/configs/pipelines/wan.py",
        "solver, no guidance": "github.com/hao-ai-lab/FastVideo fastvideo/pipelines/stages/denoising.py (DmdDenoisingStage)",
        "size": "github.com/hao-ai-lab/FastVideo fastvideo/pipelines/basic/wan/presets.py (121 frames of 704 x 1280)",
        "licence": "github.com/hao-ai-lab/hao-ai-lab.github.io content/blogs/fastvideo_post_training/index.md",
    },
    unverified="docs/design/apple_silicon_fast_mode.md of FastVideo warps these steps with shift 5 to 1, 0.940, 0.845 and calls "
    "the question unresolved; the denoising stage and the training script do not warp, so neither does this contract",
)
