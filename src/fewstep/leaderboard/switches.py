"""What papers recommend for a stable run, one change at a time: rows of a base and one switch, `dmd2+critic_updates_5`.
A switch may set several keys that belong together.

Terms with data or optimisers of their own, such as the regression anchor and the discriminator, are rows themselves (`TERMS`).
"""

from __future__ import annotations

from collections.abc import Mapping

Changes = tuple[tuple[str, str], ...]
"""Overrides of a recipe, as on the command line."""

HALF_RATE: Changes = (("settings.optim.student.lr", "3e-4"),)
"""A student that is half as fast as its critic, which keeps its 6e-4."""

FAST: Changes = (("settings.optim.student.lr", "5e-4"), ("settings.optim.critic.lr", "2e-3"))
"""A faster student, and a critic that is four times as fast: more clips are right, and those of one prompt differ less."""

ONE_TURN: Changes = (("method.critic-updates", "1"),)
"""One update of the critic per student update, where the critic is fast enough: more iterations for the same cost."""

STEADY: Changes = (("method.guidance.scale", "2"), ("method.guidance.high", "0.8"), ("method.critic-updates", "3"))
"""Less guidance, none of it at noisy times, and a critic that keeps up: what `world/dmd2` has for a longer run."""

BLOCK_HEAD: Changes = (("method.adversary.head", "block"),)
"""Every patch of the discriminator sees the whole clip (2507.13343)."""

MISMATCHED: Changes = (("method.adversary.mismatched", "true"),)
"""A discriminator that must read the prompt: a real clip under another one's prompt is not real."""


def batch(clips: int, *, ema: float) -> Changes:
    """Fewer clips per iteration, and so more iterations; the warm-up is as long as before, in clips."""
    warmup = {f"settings.optim.{role}.warmup": 5 * 16 // clips for role in ("student", "critic")}
    return tuple((key, str(value)) for key, value in ({"settings.batch": clips, "settings.ema": ema} | warmup).items())


SWITCHES: Mapping[str, Mapping[str, Changes]] = {
    "dmd2": {
        "critic_updates_1": ONE_TURN,
        "critic_updates_5": (("method.critic-updates", "5"),),  # DMD2, 2405.14867
        "slow_critic": (("settings.optim.critic.lr", "2e-4"),),  # two time scales: a third of the student's rate
        "slow_student": (("settings.optim.student.lr", "2e-4"),),
        "ema_off": (("settings.ema", "0"),),
        "ema_0.98": (("settings.ema", "0.98"),),
        "unshifted_times": (("method.score-density.shift", "1"), ("method.critic-density.shift", "1")),
        "guided_everywhere": (("method.guidance.high", "1"),),
        "batch_8": batch(8, ema=0.95),
        "batch_4": batch(4, ema=0.97) + HALF_RATE,
        "batch_4_fast": batch(4, ema=0.97) + FAST,
        "batch_4_one_turn": batch(4, ema=0.97) + FAST + ONE_TURN,
        "batch_4_steady": batch(4, ema=0.995) + HALF_RATE + STEADY,
        "batch_2": batch(2, ema=0.985) + HALF_RATE,
    },
    "dmd2_feedback": {"batch_8": batch(8, ema=0.95), "batch_2": batch(2, ema=0.985) + HALF_RATE},
    "dmd2_gan": {
        "weight_0.1": (("method.adversary.weight", "0.1"),),
        "r1": (("method.adversary.r1", "1"),),
        "block_head": BLOCK_HEAD,
    },
    "ladd": {
        "warmup_30": (("method.warmup", "30"),),  # its heads begin at chance
        "mismatched": MISMATCHED,
        "avdm2_head": BLOCK_HEAD + MISMATCHED,  # as in `world/avdm2`
    },
    "sf_v": {"avdm2_head": BLOCK_HEAD + MISMATCHED},
    "magic_distillation": {
        "plain_teacher": (("method.scorers.weak", "0"),),  # adapters alone, which collapse in the paper
    },
}
"""The changes of each switch, by the row that it is tried on."""

TERMS: Mapping[str, Mapping[str, str]] = {
    "dmd2": {
        "dmd": "regression anchor",
        "dmd2_gan": "discriminator, weight 0.03",
        "dmd2_feedback": "gradient of a reward",
        "dmd2_muon": "Muon in place of AdamW",
        "re_dmd": "clips weighed by a reward",
        "decoupled_dmd": "guidance at a time of its own",
        "diff_instruct": "weight 1 in place of the distance's",
    },
}
"""Rows that are a base with one thing more, or another: what that is, by the base and the row's name."""

JOINED = "+"
"""Between the name of a row and that of its switch."""
