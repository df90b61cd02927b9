"""Causal Forcing (2602.02214), frame-wise: Wan 2.1 1.3B as a stream of single latent frames, 4 steps each; averaged weights."""

from dataclasses import replace

from fewstep.diffusion import Stream
from fewstep.models.known.causal_forcing import CAUSAL_FORCING

_REPOSITORY = "github.com/thu-ml/Causal-Forcing"

CAUSAL_FORCING_FRAMEWISE = replace(
    CAUSAL_FORCING,
    name="causal-forcing-framewise",
    what="Wan 2.1 1.3B as a stream of single latent frames in 4 steps each: Causal Forcing",
    inside="generator_ema",
    files=r"frame-?wise[-_/]causal[-_]forcing|causal[-_]forcing[-_]frame-?wise$|causal[-_]forcing[-_]frame-?wise\.",
    contract=replace(CAUSAL_FORCING.contract, stream=Stream(chunks=(1,), window=21)),
    facts={
        **CAUSAL_FORCING.facts,
        "times, chunks": f"{_REPOSITORY} configs/causal_forcing_dmd_framewise.yaml",
        "weights": f"{_REPOSITORY} README.md (--use_ema)",
    },
)
