"""What papers recommend for a stable run, one change at a time: rows of a base and one switch, `dmd2+critic_updates_5`.

Terms with data or optimisers of their own, such as the regression anchor and the discriminator, are rows themselves (`TERMS`).
"""

from __future__ import annotations

from collections.abc import Mapping

Changes = tuple[tuple[str, str], ...]
"""Overrides of a recipe, as on the command line."""

HALF_BATCH: Changes = (
    ("settings.batch", "8"), ("settings.ema", "0.95"),  # the same average, in clips
    ("settings.optim.student.warmup", "10"), ("settings.optim.critic.warmup", "10"),
)  # fmt: skip
"""Half the clips per iteration, and so twice the iterations."""

QUARTER_BATCH: Changes = (
    ("settings.batch", "4"), ("settings.ema", "0.97"), ("settings.optim.student.lr", "3e-4"),  # the critic keeps its 6e-4
    ("settings.optim.student.warmup", "20"), ("settings.optim.critic.warmup", "20"),
)  # fmt: skip
"""A quarter of the clips, and so four times the iterations, of a student that is half as fast as its critic."""

EIGHTH_BATCH: Changes = (
    ("settings.batch", "2"), ("settings.ema", "0.985"), ("settings.optim.student.lr", "3e-4"),
    ("settings.optim.student.warmup", "40"), ("settings.optim.critic.warmup", "40"),
)  # fmt: skip
"""The same with an eighth of the clips."""

SWITCHES: Mapping[str, Mapping[str, Changes]] = {
    "dmd2": {
        "critic_updates_1": (("method.critic-updates", "1"),),
        "critic_updates_5": (("method.critic-updates", "5"),),  # DMD2, 2405.14867
        "slow_critic": (("settings.optim.critic.lr", "2e-4"),),  # two time scales: a third of the student's rate
        "slow_student": (("settings.optim.student.lr", "2e-4"),),
        "ema_off": (("settings.ema", "0"),),
        "ema_0.98": (("settings.ema", "0.98"),),
        "unshifted_times": (("method.score-density.shift", "1"), ("method.critic-density.shift", "1")),
        "guided_everywhere": (("method.guidance.high", "1"),),
        "batch_8": HALF_BATCH,
        "batch_4": QUARTER_BATCH,
        "batch_2": EIGHTH_BATCH,
    },
    "dmd2_feedback": {"batch_8": HALF_BATCH, "batch_2": EIGHTH_BATCH},
    "dmd2_gan": {
        "weight_0.1": (("method.adversary.weight", "0.1"),),
        "r1": (("method.adversary.r1", "1"),),
        "block_head": (("method.adversary.head", "block"),),  # every patch sees the whole clip, 2507.13343
    },
}
"""The changes of each switch, by the row that it is tried on."""

TERMS: Mapping[str, Mapping[str, str]] = {
    "dmd2": {
        "dmd": "regression anchor",
        "dmd2_gan": "discriminator, weight 0.03",
        "dmd2_feedback": "gradient of a reward",
        "dmd2_muon": "Muon in place of AdamW",
        "decoupled_dmd": "guidance at a time of its own",
        "diff_instruct": "weight 1 in place of the distance's",
    },
}
"""Rows that are a base with one thing more, or another: what that is, by the base and the row's name."""

JOINED = "+"
"""Between the name of a row and that of its switch."""
