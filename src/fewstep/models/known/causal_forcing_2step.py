"""Causal Forcing++ (2605.15141): Wan 2.1 1.3B as a stream of single latent frames, 2 steps each, and 4 in the first."""

from dataclasses import replace

from fewstep.diffusion import Shifted, Stream, Trained
from fewstep.models.known.causal_forcing_framewise import CAUSAL_FORCING_FRAMEWISE

CAUSAL_FORCING_2STEP = replace(
    CAUSAL_FORCING_FRAMEWISE,
    name="causal-forcing-2step",
    what="Wan 2.1 1.3B as a stream of single latent frames, 2 steps each, and 4 in the first one: Causal Forcing++",
    files=r"frame-?wise[-_]2-?step",
    contract=replace(
        CAUSAL_FORCING_FRAMEWISE.contract,
        grid=Trained(grid=Shifted(shift=5.0), steps=(2, 4)),
        steps=2,
        stream=Stream(chunks=(1,), steps=(4, 2), window=21),
    ),
    facts={
        **CAUSAL_FORCING_FRAMEWISE.facts,
        "times, chunks": "github.com/thu-ml/Causal-Forcing configs/causal_forcing_dmd_framewise_2step.yaml",
    },
)
