"""From a history of figures to one word and its reason: a pure function.

Causes come before symptoms. What is wrong with the weights, the noise path, the critic or the times explains bad clips,
while bad clips explain nothing. Every threshold is a constant below, with the reason for its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from fewstep.engine.health.vitals import Baselines, Looks, Verdict, Vitals

COARSE, MOVED = 0.9, 0.95
"""Weights on bfloat16's grid by chance: 1 in 65536. In float32 every weight that has a gradient moves."""
STILL = 0.05
"""Fewer weights than this moved: nothing was trained."""
CHANGE = 0.05
"""AdamW at a usual rate changes weights by 0.01 to 1 % an iteration; at 5 % a network forgets what it was in twenty."""
NOISE = 1.25
"""Another path holds half as much noise again (or less by as much) in the middle of the times; chance changes a few per cent."""
ASKED = 2.0
"""What the guided teacher asks for, in deviations of its own clips. On the built-in world 1.03 at a scale of 2.5, 1.5 at
7.5, 2.6 at 15, 4.9 at 30. Methods that normalise their gradient hide it from the student's clips for hundreds of iterations."""
GARISH = 1.35
"""Saturation, contrast or latent deviation relative to the teacher's. Sound students stay within 15 %."""
SHIFTED = 0.5
"""Latent means that have moved by half a standard deviation show as a tint."""
COLLAPSED = 0.4
"""Diversity, motion or contrast relative to the teacher's. Releases ask for at least 0.7."""
WORSE = 1.25
"""By which factor a figure must be worse than before training too: a student is not blamed for where it started."""
FURTHER = 1.3
"""Distance to the teacher relative to before training: beyond the noise of a dozen clips."""
FALL = 0.25
"""Drop of accuracy below the best so far: three standard errors of a few dozen clips."""
PATIENCE = 8
"""Checks, the later half of which are compared with the earlier half."""
GAIN, CLOSER = 0.02, 0.95
"""What counts as progress from half to half: accuracy by two points, or distance by 5 %."""
LEVEL = 0.05
"""So close to the teacher's accuracy, or with such a share of the first distance left, there is nothing more to gain."""
NEARER = 0.77
"""Share of the first distance that may be left of what is called nearer to the teacher: 1 / 1.3, as far below the noise of
a dozen clips as `FURTHER` is above it."""
RISE = 0.1
"""Rise of accuracy that counts as one: two standard errors of a few dozen clips that share noise with those before."""
DEAF = 0.2
"""Drop of heed below what it was before training, or below the teacher's 1 where it was more (blurs of the right colours are
further from other prompts than clips are). Sound runs with a dozen clips fell by at most 0.06."""
LAG = 1.25
"""The critic explains old samples a quarter better than fresh ones: it no longer knows the student it should describe. With
a dozen clips, critics that keep up were seen between 0.85 and 1.08."""

Rule = Callable[[Sequence[Vitals], Baselines], Iterator[Verdict]]


def judge(history: Sequence[Vitals], baselines: Baselines) -> Verdict:
    """The verdict on the newest of `history` (oldest first, not empty). Only checks of its own grid are compared."""
    same = [check for check in history if check.grid == history[-1].grid]
    for rule in RULES:
        for verdict in rule(same, baselines):
            return verdict
    return earned(same, baselines)


def earned(history: Sequence[Vitals], baselines: Baselines) -> Verdict:
    """Where nothing is wrong: `improving` only if every figure that could show a gain shows it."""
    if not any("student" in check.moved for check in history):
        return Verdict("unclear", "no update of the student has been seen yet")
    missing = "; ".join(lacking(history[-1].looks, baselines))
    if not missing:
        return Verdict("improving", progress(history, baselines))
    return Verdict("unclear", f"nothing is wrong, and not every figure shows a gain yet: {missing}")


def lacking(now: Looks, baselines: Baselines) -> Iterator[str]:
    """The figures that could show that the student is better than before its training and do not, in words.

    Nearer to the teacher, no deafer to its prompts, and more often right where the teacher is more often right than it was.
    """
    start = baselines.start
    if _share(now.distance, start.distance) > NEARER and not level(now, baselines):
        yield f"distance {now.distance:.2f} (before training {start.distance:.2f})"
    if deaf(now, baselines):
        yield f"heed of the prompt {now.heed:.2f} (before training {start.heed:.2f}, teacher 1)"
    if now.accuracy is not None and checkable(baselines) and now.accuracy < (start.accuracy or 0.0) + RISE:
        yield f"accuracy {now.accuracy:.2f} (before training {start.accuracy:.2f})"


def deaf(looks: Looks, baselines: Baselines) -> bool:
    """Do clips follow their prompts less than before training?"""
    before = baselines.start.heed
    return looks.heed is not None and before is not None and looks.heed < min(before, 1.0) - DEAF


def checkable(baselines: Baselines) -> bool:
    """Can accuracy show what the student learns: is its teacher clearly more often right than it was before training?"""
    start, teacher = baselines.start.accuracy, baselines.teacher.accuracy
    return start is not None and teacher is not None and teacher > start + RISE


def lags(vitals: Vitals) -> bool:
    """Does the critic need more updates?"""
    return vitals.lag is not None and vitals.lag > LAG


def progress(history: Sequence[Vitals], baselines: Baselines) -> str:
    """Where the student stands, in words."""
    now, start, teacher = history[-1].looks, baselines.start, baselines.teacher
    said = f"{_share(now.distance, start.distance):.0%} of its first distance to the teacher is left"
    if now.accuracy is not None and teacher.accuracy:  # a teacher that is never right: clips that nobody can read
        said = (
            f"accuracy {now.accuracy:.2f} (before training {start.accuracy:.2f}, teacher {teacher.accuracy:.2f}), "
            + said
        )
    return said + (
        f"; the critic lags ({history[-1].lag:.2f} times its error on old samples)" if lags(history[-1]) else ""
    )


# --- causes -----------------------------------------------------------------------------------------------------------


def weights(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    now = history[-1]
    moved = now.moved.get("student")
    if moved is not None and now.coarse is not None and now.coarse > COARSE and moved < MOVED:
        yield Verdict(
            "stalled",
            f"the student's weights are kept in bfloat16 ({now.coarse:.0%} lie on its grid), too coarse for its updates: "
            f"{moved:.0%} of them moved in the last iteration; keep them in float32 (autocast: bf16 is another thing)",
        )
    if now.change is not None and now.change > CHANGE:
        yield Verdict(
            "diverging",
            f"the last update changed the student's weights by {now.change:.0%} of their size; "
            f"its learning rate is about {now.change / (CHANGE / 10):.0f} times too high",
        )
    if moved is not None and moved < STILL:
        yield Verdict("stalled", f"only {moved:.0%} of the student's weights moved in the last iteration")


def noise(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    ratio = history[-1].noise
    if ratio is not None and not 1 / NOISE < ratio < NOISE:
        yield Verdict(
            "diverging",
            f"what the student is fed holds {ratio:.2f} times the noise that its path gives at these times; "
            "its inputs are noised on another path or at other times than it is told",
        )


def critic(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    for role, moved in history[-1].moved.items():
        if role != "student" and moved < STILL:
            yield Verdict(
                "diverging",
                f"the {role} does not learn ({moved:.0%} of its weights moved in the last iteration), so the student "
                "runs away from a picture of itself that is out of date",
            )


def guidance(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    asked = history[-1].asked
    if asked is not None and asked > ASKED:
        yield Verdict(
            "diverging",
            f"guidance is far too strong: the teacher with it asks for clips of {asked:.1f} times the deviation of its own",
        )


def times(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    unseen = history[-1].unseen
    if unseen:
        listed = ", ".join(f"{t:.3f}" for t in unseen)
        yield Verdict(
            "stalled",
            f"clips are sampled at times the student is not trained at ({listed}); "
            "training and sampling must use the same grid and shift",
        )


# --- symptoms ---------------------------------------------------------------------------------------------------------


def collapse(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    names = {
        "diversity": "clips of one prompt look alike",
        "motion": "clips stand still",
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
    for name, what in (("std", "latent deviation"), ("saturation", "saturation"), ("contrast", "contrast")):
        mine, before, theirs = (getattr(looks, name) for looks in (now, start, teacher))
        if theirs > 0 and mine > GARISH * theirs and mine > WORSE * before:
            yield Verdict(
                "diverging",
                f"{what} is {mine / theirs:.2f} times the teacher's (before training {before / theirs:.2f}); "
                "guidance too strong, or a critic that cannot keep up",
            )
    if now.drift > SHIFTED and now.drift > WORSE * start.drift:
        yield Verdict(
            "diverging",
            f"latent means have moved by {now.drift:.2f} standard deviations (before training {start.drift:.2f})",
        )


def away(history: Sequence[Vitals], baselines: Baselines) -> Iterator[Verdict]:
    """Two checks in a row, because one check is a dozen clips."""
    if len(history) < 2:
        return
    two = [check.looks.distance for check in history[-2:]]
    if min(two) > FURTHER * max(baselines.start.distance, 0.0):
        yield Verdict(
            "diverging",
            f"further from the teacher than before training ({_share(two[-1], baselines.start.distance):.1f} times)",
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
        yield Verdict("stalled", f"no closer to the teacher than {span} iterations ago")


def level(looks: Looks, baselines: Baselines) -> bool:
    """Is the student as good as its teacher?"""
    teacher = baselines.teacher
    if looks.accuracy is not None and teacher.accuracy is not None and checkable(baselines):
        return looks.accuracy > teacher.accuracy - LEVEL
    return looks.distance < LEVEL * baselines.start.distance


RULES: tuple[Rule, ...] = (weights, noise, critic, guidance, times, collapse, garish, away, plateau)
"""In order; the first that has something to say is the verdict."""


def _mean(looks: Sequence[Looks]) -> float:
    """Mean accuracy; 0 where there is none, so that only the distance counts."""
    return fmean(x.accuracy or 0.0 for x in looks)


def _share(value: float, whole: float) -> float:
    """`value / whole`; distances may be negative by chance."""
    return max(value, 0.0) / whole if whole > 0 else 1.0
