"""The verdict is a pure function: histories written down, and the word each of them deserves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fewstep.engine.health import Baselines, Check, Looks, Record, Verdict, Vitals, figures, judge
from fewstep.engine.health.verdict import PATIENCE, lags

TEACHER = Looks(
    accuracy=0.9, distance=0.0, drift=0.0, std=1.0, saturation=0.3, contrast=0.4, motion=0.1, diversity=0.5,
    by_frame=(1.0, 1.0), heed=1.0, apart=0.0,
)  # fmt: skip
START = replace(
    TEACHER,
    accuracy=0.1,
    heed=0.4,
    apart=0.9,
    distance=2.0,
    drift=0.2,
    std=0.8,
    saturation=0.25,
    motion=0.08,
    diversity=0.35,
)
LINES = Baselines(teacher=TEACHER, untrained=replace(TEACHER, accuracy=0.3, distance=1.5), start=START)
SOUND = Vitals(
    step=25, grid="1, 2, 4", looks=replace(TEACHER, accuracy=0.4, distance=1.2, heed=0.6, apart=0.9),
    moved={"student": 1.0, "critic": 1.0}, change=0.003, coarse=0.0, noise=1.0, asked=1.1, critic=0.8, lag=0.95,
)  # fmt: skip


def history(*changes: dict[str, Any]) -> list[Vitals]:
    """Sound checks every 25 iterations; each dictionary changes one, in `looks` or in the check itself."""
    made = []
    for i, change in enumerate(changes):
        looks = {name: value for name, value in change.items() if hasattr(TEACHER, name)}
        others = {name: value for name, value in change.items() if name not in looks}
        made.append(replace(SOUND, step=25 * (i + 1), looks=replace(SOUND.looks, **looks), **others))
    return made


FALLING = [{"accuracy": 0.1 * i, "distance": 2.0 - 0.2 * i} for i in range(1, 9)]
FLAT = [{"accuracy": 0.2, "distance": 1.6}] * PATIENCE


@pytest.mark.parametrize(
    ("word", "reason", "checks"),
    [
        ("improving", "accuracy 0.80 .before training 0.10, teacher 0.90., distance to the teacher is 20%", FALLING),
        ("improving", "accuracy 0.40", [{}]),
        ("unclear", "no update of the student has been seen", [{"moved": {"critic": 1.0}, "change": None}] * 12),
        ("unclear", "these figures show no gain yet: .*accuracy 0.10 .before training 0.10.$", [{"accuracy": 0.1}]),
        ("unclear", "distance 1.90 .before training 2.00.; accuracy 0.15", [{"accuracy": 0.15, "distance": 1.9}]),
        ("improving", "distance to the teacher is 95% of", [{"distance": 1.9, "apart": 0.85}]),  # clip by clip it is nearer
        ("unclear", "distance 1.90 .before training 2.00.$", [{"distance": 1.9, "apart": 0.88}]),
        ("unclear", "distance 2.10", [{"distance": 2.1, "apart": 0.5}]),  # blurs are alike, and far away
        ("unclear", "heed of the prompt 0.10 .before training 0.40, teacher 1.", [{"heed": 0.1}]),
        ("unclear", "distance 1.66", [{"accuracy": 0.1, "distance": 2.5 - 0.12 * i} for i in range(8)]),  # on its way
        ("diverging", "follow their prompts less .* heed 0.10 .before training 0.40", [{}, {"heed": 0.1}, {"heed": 0.1}]),
        ("improving", "the critic lags .error 1.30 times", [{"lag": 1.3}]),
        ("improving", "accuracy 0.88", [{"accuracy": 0.88, "distance": 0.3}] * 12),  # level with its teacher
        ("improving", "distance to the teacher is .* of what it was before training", [*FALLING[:4], *FLAT[:4], *FALLING[4:]]),
        ("improving", "distance to the teacher is 0% of what", [{"distance": -0.01}]),
        ("stalled", "no closer to the teacher than 175 iterations ago", FLAT),
        ("stalled", "in bfloat16 .100% of them are exact.*only 13% of them", [{"coarse": 1.0, "moved": {"student": 0.13}}]),
        ("stalled", "only 1% of the student's weights changed", [{"moved": {"student": 0.01}}]),
        ("stalled", "times at which the student is not trained .0.750, 0.250.", [{"unseen": (0.75, 0.25)}]),
        ("diverging", "changed the student's weights by 30%.*about 60 times too high", [{"change": 0.3}]),
        ("diverging", "have 1.50 times the noise.*another path", [{"noise": 1.5}]),
        ("diverging", "have 0.50 times the noise", [{"noise": 0.5}]),
        ("diverging", "guidance is far too strong.*4.9 times", [{"asked": 4.9}]),
        ("diverging", "the critic does not learn .only 0% of its weights", [{"moved": {"student": 1.0, "critic": 0.0}}]),
        ("diverging", "the discriminator does not learn", [{"moved": {"student": 1.0, "discriminator": 0.01}}]),
        ("diverging", "the image_critic does not learn", [{"moved": {"student": 1.0, "image_critic": 0.0}}]),
        ("diverging", "saturation is 1.67 times the teacher's .before training 0.83.", [{"saturation": 0.5}]),
        ("diverging", "latent standard deviation is 1.50 times", [{"std": 1.5}]),
        ("diverging", "contrast is 1.50 times", [{"contrast": 0.6}]),
        ("diverging", "latent means have moved by 0.80", [{"drift": 0.8}]),
        ("diverging", "distance to the teacher is 1.5 times what it was before", [{}, {"distance": 3.0}, {"distance": 3.0}]),
        ("diverging", "accuracy has fallen from 0.80 to 0.50", [*FALLING, {"accuracy": 0.52}, {"accuracy": 0.5}]),
        ("collapsing", "all clips of a prompt look alike: diversity is 0.30", [{"diversity": 0.15}]),
        ("collapsing", "clips hardly move: motion is 0.30", [{"motion": 0.03}]),
        ("collapsing", "clips fade to one colour", [{"contrast": 0.1}]),
    ],
)  # fmt: skip
def test_the_word_and_its_reason(word: str, reason: str, checks: list[dict[str, Any]]) -> None:
    import re

    verdict = judge(history(*checks), LINES)
    assert verdict.word == word and re.search(reason, verdict.reason), str(verdict)


@pytest.mark.parametrize(
    "checks",
    [
        [{}, {"distance": 3.0}],  # once may be chance
        [{}, {"heed": 0.1}],
        [*FALLING, {"accuracy": 0.5}],
        [{"saturation": 0.38}],  # 1.27 times the teacher's
        [{"coarse": 1.0}],  # on the grid before its first update, and yet all of it moved
        [{"noise": None, "change": None, "coarse": None, "critic": None, "lag": None, "motion": None}],
        [{"accuracy": None}] * 3,
    ],
)
def test_a_sound_run_is_not_blamed(checks: list[dict[str, Any]]) -> None:
    assert judge(history(*checks), LINES).word in ("improving", "unclear")


def test_improving_is_said_of_nothing_that_has_gained_nothing() -> None:
    """A student that is what it was before training, whatever its weights do, and one whose teacher is no better."""
    same = {"accuracy": 0.1, "distance": 2.0, "heed": 0.4, "drift": 0.2, "std": 0.8, "diversity": 0.35}
    assert [judge(history(*[same] * n), LINES).word for n in (1, PATIENCE - 1, PATIENCE)] == ["unclear"] * 2 + [
        "stalled"
    ]
    blurred = replace(LINES, start=replace(START, heed=1.2))  # further from other prompts than the teacher's clips are
    assert [judge(history({"heed": heed}), blurred).word for heed in (0.85, 0.75)] == ["improving", "unclear"]
    blind = replace(LINES, teacher=replace(TEACHER, accuracy=0.15))  # nobody can read these clips
    assert judge(history({"accuracy": 0.0}), blind).word == "improving"
    assert judge(history({"accuracy": 0.15, "distance": 2.0}), blind).word == "unclear"


def test_a_student_is_not_blamed_for_where_it_started() -> None:
    """Before training, one step gives clips that are dull, hardly move and look alike."""
    dull = replace(START, diversity=0.1, motion=0.02, contrast=0.1, saturation=0.5, std=1.6, drift=0.9)
    same = history({"diversity": 0.1, "motion": 0.02, "contrast": 0.1, "saturation": 0.5, "std": 1.6, "drift": 0.9})
    assert judge(same, replace(LINES, start=dull)).word == "improving"
    assert judge(same, LINES).word == "collapsing"


def test_causes_come_before_symptoms() -> None:
    broken = {"change": 0.4, "diversity": 0.01, "std": 5.0, "distance": 9.0}
    assert "learning rate" in judge(history(broken, broken), LINES).reason


def test_checks_of_another_grid_are_not_compared() -> None:
    """A student that goes from 8 steps to 1 gets worse before it gets better."""
    before = [replace(check, grid="8") for check in history(*[{"accuracy": 0.9, "distance": 0.1}] * 6)]
    assert judge([*before, *history({"accuracy": 0.2}, {"accuracy": 0.2})], LINES).word == "improving"


def test_without_accuracy_the_distance_decides() -> None:
    blind = Baselines(teacher=replace(TEACHER, accuracy=None), untrained=START, start=replace(START, accuracy=None))
    flat = history(*[{"accuracy": None, "distance": 1.6}] * PATIENCE)
    falling = history(*[{"accuracy": None, "distance": 1.6 - 0.1 * i} for i in range(PATIENCE)])
    arrived = history(*[{"accuracy": None, "distance": 0.05}] * PATIENCE)
    assert [judge(checks, blind).word for checks in (flat, falling, arrived)] == ["stalled", "improving", "improving"]
    assert judge(falling, blind).reason == "distance to the teacher is 45% of what it was before training"


def test_a_critic_lags_when_it_knows_old_samples_better() -> None:
    assert [lags(replace(SOUND, lag=lag)) for lag in (None, 0.9, 1.1, 1.3)] == [False, False, False, True]


def test_a_record_is_plain_values_and_back() -> None:
    check = Check(vitals=replace(SOUND, unseen=(0.25,)), verdict=Verdict("stalled", "because"), done=("stopped",))
    record = Record(steps=9, baselines={"1, 2, 4": LINES}).with_check(check)
    assert Record.of(record.tree()) == record and record.newest == LINES


def test_figures_are_numbers_by_name() -> None:
    found = figures(replace(SOUND, cosine=-0.5, unseen=(0.1,)))
    assert found["accuracy"] == 0.4 and found["cosine"] == -0.5 and found["moved/critic"] == 1.0
    assert found["std/frame 1"] == 1.0 and not {"step", "unseen", "grid"} & found.keys()
    assert "motion" not in figures(replace(SOUND, looks=replace(TEACHER, motion=None)))
