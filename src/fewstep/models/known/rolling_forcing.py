"""Rolling Forcing (2509.25161): Wan 2.1 1.3B that denoises a window of 5 chunks at once, each at a level of its own.

5 steps, 1000, 800, 600, 400, 200 under shift 5. A call reads 21 latent frames: 15 in the window, in both directions, and the sink
of 3 frames, placed just before what else is remembered. Two differences from the authors' code do not change a clip of 21 latent
frames, their own length: in the first calls they remember an estimate of the first chunk, which nothing reads; and in longer
streams their call that remembers a chunk reads the last 18 frames, where ours reads the sink and the last 15.
"""

from fewstep.diffusion import CFG, Contract, Renoise, Shifted, Stream, Trained
from fewstep.models.known.system import Known

_REPOSITORY = "github.com/TencentARC/RollingForcing"

ROLLING_FORCING = Known(
    name="rolling-forcing",
    what="Wan 2.1 1.3B as a stream with a rolling window of 5 chunks: Rolling Forcing; for academic use only",
    source="TencentARC/RollingForcing",
    bases=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    network="Wan",
    holds="weights",
    inside="generator_ema",
    files=r"rolling[-_]?forcing",
    contract=Contract(
        grid=Trained(grid=Shifted(shift=5.0), steps=(5,)), sampler=Renoise(), steps=5, guidance=CFG(scale=1.0),
        stream=Stream(chunks=(3,), rolling=5, window=21, sink=3, positions="sink"),
    ),
    licence="License Terms of RollingForcing (academic use only)",
    facts={
        "times, chunks": f"{_REPOSITORY} configs/rolling_forcing_dmd.yaml",
        "solver, commit, no guidance": f"{_REPOSITORY} pipeline/rolling_forcing_inference.py, configs/default_config.yaml",
        "rolling": f"{_REPOSITORY} pipeline/rolling_forcing_inference.py (rolling_window_length_blocks)",
        "window, sink, positions": f"{_REPOSITORY} wan/modules/causal_model.py (max_attention_size, sink_tokens)",
        "weights, key names": f"{_REPOSITORY} README.md (--use_ema), inference.py (_fsdp_wrapped_module. is dropped)",
        "licence": f"{_REPOSITORY} LICENSE",
    },
)  # fmt: skip
