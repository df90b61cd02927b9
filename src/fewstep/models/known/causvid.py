"""CausVid (2412.07772): Wan 2.1 1.3B as a causal model that makes a clip chunk by chunk, 3 steps per chunk.

x0 and fresh noise at 1000, 757, 522, chunks of 3 latent frames; the keys and values of a chunk are those of its clean latents, at
time 0. The cache of its authors holds 21 latent frames, which is one clip.
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
    inside="generator",
    files=r"causvid(?!.*bidirectional)|(^|/)autoregressive_checkpoint(/|$)",
    contract=Contract(
        grid=listed(1.0, 0.757, 0.522, shift=8.0),
        sampler=Renoise(),
        steps=3,
        guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,), window=21),
    ),
    licence="CC BY-NC-SA 4.0",
    facts={
        "times, chunks": "github.com/tianweiy/CausVid configs/wan_causal_dmd.yaml (no warping)",
        "solver, commit, memory, no guidance": "github.com/tianweiy/CausVid causvid/models/wan/causal_inference.py (a call at "
        "time 0; 32760 tokens, which are 21 latent frames)",
        "positions": "github.com/tianweiy/CausVid causvid/models/wan/causal_model.py (place in the stream)",
        "key names, weights": "github.com/tianweiy/CausVid minimal_inference/autoregressive_inference.py (model.pt, generator); "
        "causvid/train_distillation.py (no average is stored)",
        "licence": "github.com/tianweiy/CausVid LICENSE.md",
    },
    unverified="its authors tell the network 757 and 522, and noise to the nearest sigma of their grid, which is less than 0.001 "
    "away; here both are the same. Longer clips are made by its authors from overlapping clips that are encoded again; here the "
    "window of 21 frames moves on",
)
