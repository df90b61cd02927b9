"""Krea Realtime: Wan 2.1 14B as a stream of chunks of 3 latent frames, 4 steps each, trained with Self-Forcing.

Its file is plain: safetensors, the authors' names behind `model.`. Its memory is made anew before each chunk from the last 3
latent frames, in one call that reads nothing older (`Stream.recompute`). From the third chunk on the first of them is that of an
image: its last decoded frame, encoded alone (`Stream.reencode`).
"""

from fewstep.diffusion import CFG, Contract, Renoise, Shifted, Stream, Trained
from fewstep.models.known.system import Known

_REPOSITORY = "github.com/krea-ai/realtime-video"

KREA_REALTIME = Known(
    name="krea-realtime",
    what="Wan 2.1 14B as a stream of chunks in 4 steps each: Krea Realtime; not for commercial use",
    source="krea/krea-realtime-video",
    bases=("Wan-AI/Wan2.1-T2V-14B-Diffusers",),
    network="Wan",
    holds="weights",
    files=r"krea[-_]realtime",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(4,)), sampler=Renoise(), steps=4, guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,), window=6, recompute=True, reencode=True, positions="window"),
    ),
    licence="CC BY-NC-SA 4.0",
    facts={
        "times, chunks": f"{_REPOSITORY} configs/self_forcing_server_14b.yaml (1000, 937, 833, 625)",
        "memory, commit, positions, no guidance": f"{_REPOSITORY} release_server.py (recompute_kv_cache, kv_cache_num_frames 3)",
        "first latent of the past": f"{_REPOSITORY} release_server.py (get_clean_context_frames, frame_context_cache)",
        "key names": f"{_REPOSITORY} release_server.py (load_transformer)",
        "licence": f"{_REPOSITORY} LICENSE.md",
    },
    unverified="the licence of the weights' own page; that of the repository was taken. The server's default is 5 steps, its "
    "configuration has 4. While prompts change gradually the server makes the memory with those of the chunk before, here it is "
    "made with those of the chunk. The lower weight of old keys of the authors' report is not in their code",
)  # fmt: skip
