"""Self-Forcing (2506.08009): Wan 2.1 1.3B as a causal model that makes a clip chunk by chunk, 4 steps per chunk.

x0 and fresh noise at the steps 1000, 750, 500, 250 of a uniform grid under shift 5 (`warp_denoising_step`): 1, 0.9375, 0.8333,
0.625. Chunks of 3 latent frames.
"""

from fewstep.diffusion import CFG, Contract, Renoise, Shifted, Stream, Trained
from fewstep.models.known.system import Known

SELF_FORCING = Known(
    name="self-forcing",
    what="Wan 2.1 1.3B as a stream of chunks in 4 steps each: Self-Forcing",
    source="gdhe17/Self-Forcing",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    network="Wan",
    holds="weights",
    files=r"self[-_]forcing",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,)),
    ),
    licence="Apache-2.0",
    facts={
        "times, chunks": "github.com/guandeh17/Self-Forcing configs/self_forcing_dmd.yaml",
        "licence": "github.com/guandeh17/Self-Forcing LICENSE",
    },
    missing="the import of streaming students",
)  # fmt: skip
