"""The verdict: a pure function from a history of figures to one word and its reason.

Causes are tested before symptoms: a fault in the weights, the noise path, the critic or the times explains bad clips, while
bad clips explain nothing. Every threshold is a constant below, with the reason for its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from fewstep.engine.health.vitals import Baselines, Looks, Verdict, Vitals

COARSE, MOVED = 0.9, 0.95
"""Shares of weights. In float32, 1 weight in 65536 is exact in bfloat16 by chance, and every weight with a gradient moves."""
STILL = 0.05
"""Share of weights that moved; below it, the role was not trained."""
CHANGE = 0.05
"""Relative change of the weights in one iteration. AdamW at a usual learning rate changes them by 0.01 to 1 %; at 5 %, a
network has forgotten its initial weights after twenty iterations."""
NOISE = 1.25
"""Factor of noise power. In the middle of the times a wrong path has 1.5 times the noise, or 1/1.5; chance is a few per cent."""
ASKED = 2.0
"""Standard deviation of what the guided teacher predicts, relative to its own clips. On the built-in world it is 1.03 at a
guidance scale of 2.5, 1.5 at 7.5, 2.6 at 15, 4.9 at 30. If a method normalises its gradient, the student's clips do not show
this for hundreds of iterations."""
GARISH = 1.35
"""Saturation, contrast or latent standard deviation relative to the teacher's. Sound students stay within 15 %."""
SHIFTED = 0.5
"""Shift of the latent means in standard deviations; half a standard deviation is visible as a tint."""
COLLAPSED = 0.4
"""Diversity, motion or contrast relative to the teacher's. A released student needs at least 0.7."""
WORSE = 1.25
"""Factor by which a figure must also be worse than before training: a poor start alone is no fault of the training."""
FURTHER = 1.3
"""Distance to the teacher relative to the distance before training; more than the noise of a dozen clips."""
FALL = 0.25
"""Drop of accuracy below the best so far; three standard errors with a few dozen clips."""
PATIENCE = 8
"""Number of checks; the later half is compared with the earlier half."""
GAIN, CLOSER = 0.02, 0.95
"""Least progress from half to half: accuracy rises by two points, or distance falls by 5 %."""
LEVEL = 0.05
"""Gap to the teacher's accuracy, or share of the initial distance, at which there is nothing more to gain."""
NEARER = 0.77
"""Largest share of the initial distance at which a student counts as nearer to the teacher: 1 / 1.3, the inverse of
`FURTHER`."""
ALIKE = 0.95
"""Largest share of the initial difference from the teacher's clips of the same noise at which clips count as more alike. In a
sound consistency run it stayed within 2 % for 72 iterations, and then fell at every check."""
RISE = 0.1
"""Least rise of accuracy that counts; two standard errors with a few dozen clips that share noise with the earlier ones."""
DEAF = 0.2
"""Drop of heed below its value before training, or below 1, the teacher's value, if it was higher (blurs in the right colours
score above 1). In sound runs with a dozen clips it fell by at most 0.06."""
LAG = 1.25
"""Lag of a critic that fits old samples a quarter better than new ones: it describes a student of the past. With a dozen
clips, critics that keep up had a lag between 0.85 and 1.08."""

Rule = Callable[[Sequence[Vitals], Baselines], Iterator[Verdict]]


def judge(history: Sequence[Vitals], baselines: Baselines) -> Verdict:
    """The verdict on the newest check of `history` (oldest first, not empty). Only checks with its grid are compared."""
    same = [check for check in history if check.grid == history[-1].grid]
    for rule in RULES:
        for verdict in rule(same, baselines):
            return verdict
    return earned(same, baselines)


def earned(history: Sequence[Vitals], baselines: Baselines) -> Verdict:
    """The verdict if no rule finds a fault: `improving` only if every figure that can show a gain shows one."""
    if not any("student" in check.moved for check in history):
        return Verdict("unclear", "no update of the student has been seen yet")
    missing = "; ".join(lacking(history[-1].looks, baselines))
    if not missing:
        return Verdict("improving", progress(history, baselines))
    return Verdict("unclear", f"no fault found, but these figures show no gain yet: {missing}")


def lacking(now: Looks, baselines: Baselines) -> Iterator[str]:
    """The figures that can show a gain over the untrained student and do not show one, in words.

    A gain is: nearer to the teacher, no less heed of the prompt, and higher accuracy if the teacher's accuracy was higher.
    """
    start = baselines.start
    if not nearer(now, baselines):
        yield f"distance {now.distance:.2f} (before training {start.distance:.2f})"
    if deaf(now, baselines):
        yield f"heed of the prompt {now.heed:.2f} (before training {start.heed:.2f}, teacher 1)"
    if now.accuracy is not None and checkable(baselines) and now.accuracy < (start.accuracy or 0.0) + RISE:
        yield f"accuracy {now.accuracy:.2f} (before training {start.accuracy:.2f})"


def nearer(now: Looks, baselines: Baselines) -> bool:
    """Whether clips are nearer to the teacher's than before training: as a whole, or clip by clip and not further as a whole."""
    start = baselines.start
    alike = now.apart is not None and start.apart is not None and now.apart <= ALIKE * start.apart
    return level(now, baselines) or _share(now.distance, start.distance) <= (1.0 if alike else NEARER)


def deaf(looks: Looks, baselines: Baselines) -> bool:
    """Do clips follow their prompts less than before training?"""
    before = baselines.start.heed
    return looks.heed is not None and before is not None and looks.heed < min(before, 1.0) - DEAF


def checkable(baselines: Baselines) -> bool:
    """Can accuracy show what the student learns? Only if the teacher's accuracy is clearly higher than the untrained one."""
    start, teacher = baselines.start.accuracy, baselines.teacher.accuracy
    return start is not None and teacher is not None and teacher > start + RISE


def lags(vitals: Vitals) -> bool:
    """Does the critic need more updates?"""
    return vitals.lag is not None and vitals.lag > LAG


def progress(history: Sequence[Vitals], baselines: Baselines) -> str:
    """The student's progress, in words."""
    now, start, teacher = history[-1].looks, baselines.start, baselines.teacher
    said = f"distance to the teacher is {_share(now.distance, start.distance):.0%} of what it was before training"
    if now.accuracy is not None and teacher.accuracy:  # if the teacher's is 0, the checker cannot read these clips
        said = (
            f"accuracy {now.accuracy:.2f} (before training {start.accuracy:.2f}, teacher {teacher.accuracy:.2f}), "
            + said
        )
    return said + (
        f"; the critic lags (error {history[-1].lag:.2f} times that on old samples)" if lags(history[-1]) else ""
    )


# --- causes -----------------------------------------------------------------------------------------------------------


def weights(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    now = history[-1]
    moved = now.moved.get("student")
    if moved is not None and now.coarse is not None and now.coarse > COARSE and moved < MOVED:
        yield Verdict(
            "stalled",
            f"the student's weights are stored in bfloat16 ({now.coarse:.0%} of them are exact in it), which is too coarse "
            f"for its updates: only {moved:.0%} of them changed in the last iteration; store them in float32 "
            "(settings.autocast: bf16 does not change the stored type)",
        )
    if now.change is not None and now.change > CHANGE:
        yield Verdict(
            "diverging",
            f"the last update changed the student's weights by {now.change:.0%} of their size; "
            f"the learning rate is about {now.change / (CHANGE / 10):.0f} times too high",
        )
    if moved is not None and moved < STILL:
        yield Verdict("stalled", f"only {moved:.0%} of the student's weights changed in the last iteration")


def noise(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    ratio = history[-1].noise
    if ratio is not None and not 1 / NOISE < ratio < NOISE:
        yield Verdict(
            "diverging",
            f"the student's training inputs have {ratio:.2f} times the noise of its path at these times; "
            "the training adds noise with another path, or at other times, than it tells the student",
        )


def critic(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    for role, moved in history[-1].moved.items():
        if role != "student" and moved < STILL:
            yield Verdict(
                "diverging",
                f"the {role} does not learn (only {moved:.0%} of its weights changed in the last iteration), so the "
                f"student is trained against a {role} that is out of date",
            )


def guidance(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    asked = history[-1].asked
    if asked is not None and asked > ASKED:
        yield Verdict(
            "diverging",
            f"guidance is far too strong: with it, the teacher predicts clips with {asked:.1f} times the standard deviation "
            "of its own clips",
        )


def times(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    unseen = history[-1].unseen
    if unseen:
        listed = ", ".join(f"{t:.3f}" for t in unseen)
        yield Verdict(
            "stalled",
            f"sampling visits times at which the student is not trained ({listed}); "
            "training and sampling must use the same grid and shift",
        )


# --- symptoms ---------------------------------------------------------------------------------------------------------


def collapse(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    names = {
        "diversity": "all clips of a prompt look alike",
        "motion": "clips hardly move",
        "contrast": "clips fade to one colour",
    }
    for name, what in names.items():
        now, start, teacher = (
            getattr(looks, name) for looks in (history[-1].looks, baselines.start, baselines.teacher)
        )
        if now is None or not teacher:
            continue
        if now < COLLAPSED * teacher and now < start / WORSE:
            yield Verdict("collapsing", f"{what}: {name} is {now / teacher:.2f} of the teacher's")


def garish(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    now, start, teacher = history[-1].looks, baselines.start, baselines.teacher
    for name, what in (("std", "latent standard deviation"), ("saturation", "saturation"), ("contrast", "contrast")):
        mine, before, theirs = (getattr(looks, name) for looks in (now, start, teacher))
        if theirs > 0 and mine > GARISH * theirs and mine > WORSE * before:
            yield Verdict(
                "diverging",
                f"{what} is {mine / theirs:.2f} times the teacher's (before training {before / theirs:.2f}); "
                "guidance is too strong, or the critic cannot keep up",
            )
    if now.drift > SHIFTED and now.drift > WORSE * start.drift:
        yield Verdict(
            "diverging",
            f"latent means have moved by {now.drift:.2f} standard deviations (before training {start.drift:.2f})",
        )


def away(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    """Needs two checks in a row, because one check has only a dozen clips."""
    if len(history) < 2:
        return
    two = [check.looks.distance for check in history[-2:]]
    if min(two) > FURTHER * max(baselines.start.distance, 0.0):
        yield Verdict(
            "diverging",
            f"distance to the teacher is {_share(two[-1], baselines.start.distance):.1f} times what it was before training",
        )
    if all(deaf(check.looks, baselines) for check in history[-2:]):
        yield Verdict(
            "diverging",
            f"clips follow their prompts less than before training: heed {history[-1].looks.heed:.2f} "
            f"(before training {baselines.start.heed:.2f}, teacher 1)",
        )
    right = [check.looks.accuracy for check in history if check.looks.accuracy is not None]
    if len(right) > 2 and max(right[-2:]) < max(right) - FALL:
        yield Verdict("diverging", f"accuracy has fallen from {max(right):.2f} to {right[-1]:.2f}")


def plateau(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    recent = [check.looks for check in history[-PATIENCE:] if "student" in check.moved]
    if len(recent) < PATIENCE or level(recent[-1], baselines):
        return
    half = PATIENCE // 2
    gain = _mean(recent[half:]) - _mean(recent[:half])
    closer = _share(fmean(x.distance for x in recent[half:]), fmean(x.distance for x in recent[:half]))
    if gain < GAIN and closer > CLOSER:
        span = history[-1].step - history[-PATIENCE].step
        yield Verdict("stalled", f"the student is no closer to the teacher than {span} iterations ago")


def level(looks: Looks, baselines: Baselines) -> bool:
    """Is the student as good as its teacher?"""
    teacher = baselines.teacher
    if looks.accuracy is not None and teacher.accuracy is not None and checkable(baselines):
        return looks.accuracy > teacher.accuracy - LEVEL
    return looks.distance < LEVEL * baselines.start.distance


RULES: tuple[Rule, ...] = (weights, noise, critic, guidance, times, collapse, garish, away, plateau)
"""Rules in order; the first one that finds a fault gives the verdict."""


def _mean(looks: Sequence[Looks]) -> float:
    """Mean accuracy; 0 if there is none, so that only the distance counts."""
    return fmean(x.accuracy or 0.0 for x in looks)


def _share(value: float, whole: float) -> float:
    """`value / whole`, at least 0: an estimated distance may be negative by chance."""
    return max(value, 0.0) / whole if whole > 0 else 1.0
