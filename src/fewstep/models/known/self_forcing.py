"""Self-Forcing (2506.08009): Wan 2.1 1.3B as a causal model that makes a clip chunk by chunk, 4 steps per chunk.

x0 and fresh noise at the steps 1000, 750, 500, 250 of a uniform grid under shift 5 (`warp_denoising_step`): 1, 0.9375, 0.8333,
0.625. Chunks of 3 latent frames; the keys and values of a chunk are those of its clean latents, at time 0.
"""

from fewstep.diffusion import CFG, Contract, Renoise, Shifted, Stream, Trained
from fewstep.models.known.system import Known

SELF_FORCING = Known(
    name="self-forcing",
    what="Wan 2.1 1.3B as a stream of chunks in 4 steps each: Self-Forcing; not for commercial use",
    source="gdhe17/Self-Forcing",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    network="Wan",
    holds="weights",
    inside="generator_ema",
    files=r"self[-_]forcing",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,), window=21),
    ),
    licence="CC BY-NC-SA 4.0",
    facts={
        "times, chunks": "github.com/guandeh17/Self-Forcing configs/self_forcing_dmd.yaml",
        "solver, commit, memory, no guidance": "github.com/guandeh17/Self-Forcing pipeline/causal_inference.py, "
        "configs/default_config.yaml (context_noise 0; 32760 tokens, which are 21 latent frames)",
        "positions": "github.com/guandeh17/Self-Forcing wan/modules/causal_model.py (place in the stream)",
        "weights": "github.com/guandeh17/Self-Forcing README.md (--use_ema), inference.py",
        "key names": "github.com/guandeh17/Self-Forcing utils/wan_wrapper.py (model.), utils/distributed.py (EMA_FSDP)",
        "licence": "huggingface.co/gdhe17/Self-Forcing README.md; github.com/guandeh17/Self-Forcing LICENSE",
    },
    unverified="the page of the weights has CC BY-NC-SA 4.0 (read in a copy of it), and the repository of the code Apache-2.0; "
    "the stricter was taken. In training a chunk is remembered at the lowest time of the grid, about 0.005, and in inference at "
    "exactly 0; inference was taken. Its authors make clips of 21 latent frames; here the window of 21 moves on",
)  # fmt: skip
