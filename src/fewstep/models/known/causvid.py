"""CausVid (2412.07772): Wan 2.1 1.3B as a causal model that makes a clip chunk by chunk, 3 steps per chunk.

x0 and fresh noise at 1000, 757, 522, chunks of 3 latent frames; the keys and values of a chunk are those of its clean latents.
"""

from fewstep.diffusion import CFG, Contract, Renoise, Stream
from fewstep.models.known.system import Known, listed

CAUSVID = Known(
    name="causvid",
    what="Wan 2.1 1.3B as a stream of chunks in 3 steps each: CausVid; not for commercial use",
    source="tianweiy/CausVid",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    network="Wan",
    holds="weights",
    files=r"causvid",
    contract=Contract(
        grid=listed(1.0, 0.757, 0.522, shift=8.0),
        sampler=Renoise(),
        steps=3,
        guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,)),
    ),
    licence="CC BY-NC-SA 4.0",
    facts={
        "times, chunks": "github.com/tianweiy/CausVid configs/wan_causal_dmd.yaml (no warping)",
        "licence": "github.com/tianweiy/CausVid LICENSE.md",
    },
    missing="the import of streaming students",
)
