"""Measure whether a style LoRA that was trained on the teacher still works on its student."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.atomic import write_text
from fewstep.core.finite import require_finite
from fewstep.core.pixels import to_uint8
from fewstep.evaluate.features.extractors import feature_map
from fewstep.evaluate.page.animate import grid_gif
from fewstep.models.bundle import VideoModel

Progress = Callable[[str, int, int], None]
_SHOWN = 4
_NOTHING = 1e-6
"""Size of a shift, relative to the features, below which it counts as none."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of a LoRA's effect on the teacher the student shows.

    `d_T` is the change that the LoRA makes to the teacher: features with it minus features without it, for the same prompts
    and noise, mean over n clips. `d_S` is the student's change, with the LoRA or distilled again. Both contain only what the
    style changes in the same way in all clips. They say nothing about quality, and need features that see the style.
    """

    score: float
    """`<d_T, d_S> / <d_T, d_T>`: 1 = like the teacher, 0 = no effect, above 1 = stronger, below 0 = opposite."""
    cosine: float
    """Cosine of the two changes: 1 is the same direction, 0 is unrelated, or no change in the student."""
    size: float
    """`|d_S| / |d_T|`; the score is `cosine * size`."""
    error: float
    """Standard error of the score over prompts (jackknife); NaN with one prompt."""
    n: int
    """Clips of each of the four kinds."""
    features: str


@dataclass(frozen=True)
class Styled:
    """A model without and with a style."""

    plain: VideoModel
    styled: VideoModel
    how: str = "+ LoRA"
    """Source of the style, as a label in the picture."""

    @classmethod
    def by_lora(cls, model: VideoModel, lora: Path | str) -> Styled:
        """A model, and the same model with a LoRA merged. FileNotFoundError or ValueError if the LoRA does not fit."""
        return cls(model, model.with_lora(lora))


def check_style(
    teacher: Styled, student: Styled, prompts: Sequence[str], output: Path | str,
    *, seeds: int = 2, features: str = "auto", progress: Progress | None = None,
) -> Survival:  # fmt: skip
    """Sample clips from teacher and student, each without and with the style. Write `lora.json` and `lora.gif` to `output`.

    Each model is sampled by its own contract, with `seeds` clips per prompt; `features` as in `feature_map`. ValueError if the
    models' clips differ in size, or if the style does not change the teacher.
    """
    models = [model for pair in (teacher, student) for model in (pair.plain, pair.styled)]
    labels = ("teacher", f"teacher {teacher.how}", "student", f"student {student.how}")
    sizes = {(m.card.num_frames, m.card.height, m.card.width) for m in models}
    if len(sizes) > 1:
        raise ValueError(
            f"the models make clips of different (frames, height, width): {sorted(sizes)}; give models of one size"
        )
    card, shown, size = teacher.plain.card, dict[str, Tensor](), sizes.pop()
    seen = feature_map(features, size[1:], teacher.plain.device)
    seen.check(size[0], size[1:], teacher.plain.device)
    found = []
    for label, model in zip(labels, models, strict=True):
        rows, shown[label] = _features(model, prompts, seeds, seen.map, label, progress)
        found.append(rows.unflatten(0, (len(prompts), -1)))
    survival = _survival(found, seen.name)
    output = Path(output)
    grid_gif(output / "lora.gif", shown, fps=card.fps, scale=max(1, 128 // max(card.height, card.width)))
    write_text(output / "lora.json", json.dumps(asdict(survival), indent=2) + "\n")
    return survival


@torch.no_grad()
def _features(
    model: VideoModel, prompts: Sequence[str], seeds: int, look: Callable[[Tensor], Tensor], label: str,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Features `[n, D]` of every clip, and the first clip of the first prompts."""
    rows, shown = [], []
    for number, prompt in enumerate(prompts):
        first = number * seeds
        clips = model([prompt] * seeds, seed=tuple(range(first, first + seeds)))
        require_finite(clips, f"clips of {label} for {prompt!r}")
        rows.append(look(clips.float()).double().cpu())
        if number < _SHOWN:
            shown.append(to_uint8(clips[:1]).cpu())
        if progress is not None:
            progress(label, number + 1, len(prompts))
    return torch.cat(rows), torch.cat(shown)


def _survival(found: Sequence[Tensor], features: str) -> Survival:
    """The survival from features `[P, S, D]` (prompts, clips of each, values) of teacher and student, each without and with
    the style."""
    teacher, teacher_styled, student, student_styled = found
    by_teacher, by_student = (teacher_styled - teacher).mean(1), (student_styled - student).mean(1)
    reach, size = float(by_teacher.mean(0).norm()), float(by_student.mean(0).norm())
    if reach <= _NOTHING * float(teacher.norm(dim=-1).mean()):
        raise ValueError(
            "this LoRA does not change the teacher's clips, measured with these features; check that it was trained for this "
            "teacher, or give other --features"
        )
    score = _score(by_teacher, by_student)
    return Survival(
        score=score, cosine=score * reach / size if size > 0 else 0.0, size=size / reach,
        error=_error(by_teacher, by_student), n=teacher.shape[0] * teacher.shape[1], features=features,
    )  # fmt: skip


def _score(by_teacher: Tensor, by_student: Tensor) -> float:
    of_teacher = by_teacher.mean(0)
    return float(by_student.mean(0) @ of_teacher / of_teacher.square().sum())


def _error(by_teacher: Tensor, by_student: Tensor) -> float:
    """Standard error of the score: jackknife over prompts."""
    count = len(by_teacher)
    if count == 1:
        return math.nan
    others = [torch.arange(count) != left_out for left_out in range(count)]
    scores = torch.tensor([_score(by_teacher[kept], by_student[kept]) for kept in others], dtype=torch.float64)
    return float(((count - 1) * scores.var(unbiased=False)).sqrt())
