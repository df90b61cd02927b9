"""What a check finds out: plain figures, so that a history of them can be stored, judged and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

Word = Literal["improving", "unclear", "stalled", "diverging", "collapsing"]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What the clips of one sampler look like on the fixed prompts and seeds; means over all its step counts."""

    accuracy: float | None
    """Share of clips with every attribute right; None where prompts cannot be checked."""
    distance: float
    """Energy distance to the teacher's clips, prompt by prompt, in units of `metrics.pooled`. The teacher's own is 0."""
    drift: float
    """Root mean square over channels of the latent mean's shift from the teacher's, in its standard deviations."""
    std: float
    """Standard deviation of the latents."""
    saturation: float
    contrast: float
    motion: float | None
    """None for single images."""
    diversity: float
    by_frame: tuple[float, ...]
    """Standard deviation of the latents frame by frame: rot that spreads from one end shows here first."""
    heed: float | None = None
    """By how much nearer clips are to the teacher's of their own prompt than to those of the other prompts, relative to the
    teacher's own: 1 = as the teacher, 0 = the prompt makes no difference. Blurs may have more. None with a single prompt."""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """One check. None: there was nothing to measure it on."""

    step: int
    """Iterations done."""
    grid: str
    """The step counts of the student's sampler; only checks of the same grid are compared with each other."""
    looks: Looks
    moved: dict[str, float] = field(default_factory=dict)
    """Share of the weights that the last iteration changed, by trained role."""
    change: float | None = None
    """Size of the student's last update relative to its weights, `|after - before| / |before|`."""
    coarse: float | None = None
    """Share of the student's weights that bfloat16 holds exactly: 1 if they are kept in it, about 0 in float32."""
    noise: float | None = None
    """Power of the noise in what the student is fed in training, relative to what its path gives at the same times."""
    asked: float | None = None
    """Deviation of the clean clips (or frames) that the guided network predicts from the teacher's, noised, relative to
    theirs: what guidance asks of the student. None for a method without guidance."""
    unseen: tuple[float, ...] = ()
    """Times its sampler visits and its training does not come near."""
    critic: float | None = None
    """The critic's error on fresh student samples, relative to that of the network it began as: 1 = has learnt nothing. A
    critic of single frames is tested on single frames."""
    lag: float | None = None
    """That figure relative to the same on samples of the student before training: above 1, it knows old ones better."""
    cosine: float | None = None
    """Smallest cosine between the gradients of two loss terms of the student; None with a single term."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Figures that this run has something to measure on and cannot measure, and why."""


@dataclass(frozen=True)
class Verdict:
    """One word and why."""

    word: Word
    reason: str

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What a student is compared with, on the same prompts and seeds."""

    teacher: Looks
    """At its own number of steps."""
    untrained: Looks
    """The teacher at the student's steps, with its own sampler and guidance: what nobody has to train for."""
    start: Looks
    """The student before its first iteration: the teacher's weights in the student's sampler."""


def figures(vitals: Vitals) -> dict[str, float]:
    """All that is a number, by name, for logs."""
    found: dict[str, float] = {}
    for source in (vitals.looks, vitals):
        for item in fields(source):
            value = getattr(source, item.name)
            if isinstance(value, float):
                found[item.name] = value
    found |= {f"moved/{role}": share for role, share in vitals.moved.items()}
    frames = vitals.looks.by_frame
    return found | {f"std/frame {i}": std for i, std in enumerate(frames)} if len(frames) > 1 else found


def unsaid(vitals: Vitals) -> list[str]:
    """What the verdict does not rest on, in words: to be said wherever the verdict is."""
    return [f"not measured: {name} ({why})" for name, why in vitals.unmeasured.items()]
