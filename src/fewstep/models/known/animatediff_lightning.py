"""AnimateDiff-Lightning (2403.12706): motion modules distilled for 1, 2, 4 or 8 steps, each step count in a file of its own.

Euler over trailing timesteps of the linear table, eps prediction, no guidance. In 4 steps 999, 749, 499, 249.
"""

from fewstep.diffusion import CFG, DDIM, Contract, Timesteps, Trained
from fewstep.models.known.system import LINEAR, Known

ANIMATEDIFF_LIGHTNING = Known(
    name="animatediff-lightning",
    what="AnimateDiff in 1, 2, 4 or 8 steps: motion modules of AnimateDiff-Lightning, a file for each step count",
    source="ByteDance/AnimateDiff-Lightning",
    bases=("AnimateDiffPipeline over Stable Diffusion 1.5",),
    network="AnimateDiff",
    holds="motion",
    files=r"animatediff[-_]lightning",
    path=LINEAR,
    kind="eps",
    contract=Contract(
        grid=Trained(grid=Timesteps(spacing="trailing"), steps=(1, 2, 4, 8)),
        sampler=DDIM(),
        steps=4,
        guidance=CFG(scale=1.0),
    ),
    per_file=True,
    licence="creativeml-openrail-m",
    facts={
        "times, solver, table": "huggingface.co/ByteDance/AnimateDiff-Lightning README.md (EulerDiscreteScheduler, "
        "trailing, linear)",
        "files, licence": "huggingface.co/ByteDance/AnimateDiff-Lightning/tree/027c893eec01df7330f5d4b733bc9485ee02e8b2",
        "paper": "arxiv.org/abs/2403.12706",
    },
    unverified="EulerDiscreteScheduler begins with noise of 0.9992 of its size, because the linear table leaves a little "
    "signal at the last timestep; this contract begins with pure noise, as the teacher. 1 step is experimental, say its authors",
)
