"""LongLive 1.0 (2509.22622): Wan 2.1 1.3B as a stream with a short window and a sink, 4 steps per chunk of 3 latent frames.

The grid of Self-Forcing. A chunk reads 12 latent frames: the first 3 of the stream, the 6 before it, and its own. The student is
two files in one folder: the network, and a LoRA of long clips (`lora.pt`, rank and alpha 256, so its strength is 1).
"""

from fewstep.diffusion import CFG, Contract, Renoise, Shifted, Stream, Trained
from fewstep.models.known.system import Known

_REPOSITORY = "github.com/NVlabs/LongLive (branch v1.0)"

LONGLIVE = Known(
    name="longlive",
    what="Wan 2.1 1.3B as a stream of minutes, with a window and a sink, in 4 steps per chunk: LongLive 1.0 by NVIDIA",
    source="Efficient-Large-Model/LongLive-1.3B",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    network="Wan",
    holds="adapted",
    inside="generator",
    files=r"longlive(?!-?_?2)",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,), window=12, sink=3),
    ),
    licence="Apache-2.0",
    facts={
        "times, chunks, window, sink, commit, weights": f"{_REPOSITORY} configs/longlive_inference.yaml (use_ema false, "
        "context_noise 0)",
        "solver, no guidance": f"{_REPOSITORY} pipeline/causal_inference.py",
        "positions": f"{_REPOSITORY} wan/modules/causal_model.py (place in the stream; the sink counts towards the window)",
        "key names": f"{_REPOSITORY} inference.py (generator, or model; generator_lora, or peft's names alone), "
        "utils/lora_utils.py (peft, all linear layers of the blocks)",
        "licence": f"{_REPOSITORY} LICENSE, README.md (changed to Apache-2.0 on 2025.11.1)",
    },
    unverified="the licence of the weights' own page; that of the repository was taken. A second configuration of its authors "
    "(longlive_inference_infinity.yaml) places remembered frames by their place in the window, so that a stream never ends; the "
    "first was taken, which ends with the network's table, after 1024 latent frames",
)  # fmt: skip
