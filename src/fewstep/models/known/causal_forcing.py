"""Causal Forcing (2602.02214), chunk-wise: Wan 2.1 1.3B as a stream of chunks of 3 latent frames, 4 steps each.

Sampled like Self-Forcing, whose code it is built on. Its authors sample the weights that are not averaged.
"""

from dataclasses import replace

from fewstep.models.known.self_forcing import SELF_FORCING

_REPOSITORY = "github.com/thu-ml/Causal-Forcing"

CAUSAL_FORCING = replace(
    SELF_FORCING,
    name="causal-forcing",
    what="Wan 2.1 1.3B as a stream of chunks in 4 steps each: Causal Forcing",
    source="zhuhz22/Causal-Forcing",
    inside="generator",
    files=r"chunk-?wise[-_/]causal[-_]forcing|causal[-_]forcing[-_]chunk-?wise",
    licence="Apache-2.0",
    facts={
        "times, chunks": f"{_REPOSITORY} configs/causal_forcing_dmd_chunkwise.yaml",
        "solver, commit, memory, no guidance": f"{_REPOSITORY} pipeline/causal_inference.py, configs/default_config.yaml",
        "positions": f"{_REPOSITORY} wan/modules/causal_model.py",
        "weights": f"{_REPOSITORY} README.md (no --use_ema for the chunk-wise model)",
        "key names": f"{_REPOSITORY} inference.py (model., after FSDP model._fsdp_wrapped_module.)",
        "licence": f"huggingface.co/zhuhz22/Causal-Forcing README.md; {_REPOSITORY} LICENSE",
    },
    unverified="the page of the weights was read in a copy of it. Its authors make clips of 21 latent frames; here the window of "
    "21 moves on",
)
