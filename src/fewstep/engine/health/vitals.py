"""The figures of a check: plain numbers, so that their history can be stored, judged and plotted."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

Word = Literal["improving", "unclear", "stalled", "diverging", "collapsing"]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Figures of one sampler's clips on the fixed prompts and seeds; means over all its step counts."""

    accuracy: float | None
    """Share of clips with every attribute right; None where prompts cannot be checked."""
    distance: float
    """Energy distance to the teacher's clips, prompt by prompt, in units of `metrics.pooled`. The teacher itself has 0."""
    drift: float
    """Shift of the latent mean from the teacher's, in the teacher's standard deviations: root mean square over channels."""
    std: float
    """Standard deviation of the latents."""
    saturation: float
    contrast: float
    motion: float | None
    """Motion of the clips; None for single images."""
    diversity: float
    by_frame: tuple[float, ...]
    """Standard deviation of the latents per frame. If clips decay from one end, this figure shows it first."""
    heed: float | None = None
    """How much closer clips are to the teacher's clips of their own prompt than to those of other prompts, relative to the
    teacher itself: 1 = like the teacher, 0 = the prompt has no effect. Blurred clips may score higher. None with a single
    prompt."""
    apart: float | None = None
    """Root mean square difference from the teacher's clips that start from the same noise, in the standard deviation of the
    teacher's clips. It has little noise of its own. Methods that match distributions need not lower it."""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """Figures of one check. None means that the figure does not apply or could not be measured."""

    step: int
    """Iterations done."""
    grid: str
    """Step counts of the student's sampler. Only checks with the same grid are compared."""
    looks: Looks
    moved: dict[str, float] = field(default_factory=dict)
    """Share of each trained role's weights that the last iteration changed."""
    change: float | None = None
    """Size of the student's last update relative to its weights, `|after - before| / |before|`."""
    coarse: float | None = None
    """Share of the student's weights that bfloat16 represents exactly: 1 if they are kept in bfloat16, about 0 in float32."""
    noise: float | None = None
    """Noise power of the student's training inputs, relative to its path at the same times; 1 is right."""
    asked: float | None = None
    """Strength of guidance: the standard deviation of what the guided network predicts from the teacher's clips with noise,
    relative to that of the teacher's clips. None for a method without guidance."""
    unseen: tuple[float, ...] = ()
    """Times that the sampler visits and training does not come near."""
    critic: float | None = None
    """Error of the critic on new student samples, relative to the network it started from: 1 = it has learnt nothing. A
    critic of single frames is tested on single frames."""
    lag: float | None = None
    """The `critic` figure divided by the same figure on samples of the untrained student. Above 1, the critic knows old
    samples better."""
    cosine: float | None = None
    """Smallest cosine between the gradients of two of the student's loss terms; None with a single term."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Figures that apply to this run but could not be measured, with the reason."""


@dataclass(frozen=True)
class Verdict:
    """One word and the reason for it."""

    word: Word
    reason: str

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What a student is compared with, on the same prompts and seeds."""

    teacher: Looks
    """The teacher at its own number of steps."""
    untrained: Looks
    """The teacher at the student's steps, with its own sampler and guidance: the result without any training."""
    start: Looks
    """The student before its first iteration: its initial weights in its own sampler."""


def figures(vitals: Vitals) -> dict[str, float]:
    """All figures that are numbers, by name, for logs."""
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
    """Figures that are missing from the verdict, in words; whoever shows the verdict shows them too."""
    return [f"not measured: {name} ({why})" for name, why in vitals.unmeasured.items()]
