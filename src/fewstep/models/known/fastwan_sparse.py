"""FastWan2.1 (1.3B, 14B) and FastWan2.2-TI2V-5B of FastVideo: distilled together with Video Sparse Attention (VSA).

Their blocks have a gate (`to_gate_compress`) between a compressed and a sparse branch, which dense attention does not have.
"""

from fewstep.diffusion import CFG, Contract, Renoise
from fewstep.models.known.system import Known, listed

FASTWAN_SPARSE = Known(
    name="fastwan-sparse",
    what="Wan 2.1 1.3B and 14B, Wan 2.2 5B in 3 steps with sparse attention (VSA), distilled with DMD by FastVideo",
    source="FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
    bases=("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers"),
    network="Wan",
    holds="weights",
    files=r"fastwan2\.?(1|2(?!.*fullattn))",
    keys=r"to_gate_compress",
    contract=Contract(grid=listed(1.0, 0.757, 0.522, shift=8.0), sampler=Renoise(), steps=3, guidance=CFG(scale=1.0)),
    size={"num_frames": 61, "height": 448, "width": 832},
    licence="Apache-2.0",
    facts={
        "times": "github.com/hao-ai-lab/FastVideo docs/distillation/dmd.md, examples/distill/Wan2.1-T2V/Wan-Syn-Data-480P",
        "size, attention": "github.com/hao-ai-lab/FastVideo docs/distillation/dmd.md (61 x 448 x 832; VSA)",
        "key names": "github.com/hao-ai-lab/FastVideo fastvideo/attention/backends/video_sparse_attn_h3.py",
        "licence": "github.com/hao-ai-lab/hao-ai-lab.github.io content/blogs/fastvideo_post_training/index.md",
    },
    missing="an attention pattern with VSA's compressed branch and its gate (to_gate_compress)",
)
