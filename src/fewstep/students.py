"""Several students, each for one part of the prompts: multi-student distillation (MSD, 2410.23274)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.core import Cond
from fewstep.data.parts import Part, Partition
from fewstep.models.bundle import VideoModel
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.written import FILE

SHARED = ("text", "codec")
"""Parts that all students have in common."""


@dataclass(frozen=True, kw_only=True)
class Students:
    """One student per part of the prompts. Each prompt goes to the student that was trained on its part.

    A clip is the one that its student makes alone, for the same prompt and seed. Clips are made part by part, so they cost as
    much as those of one student; what grows with the number of students is the memory.
    """

    by: Partition
    """The rule by which the prompts of training were divided, too."""
    students: tuple[VideoModel, ...]
    """The student of each part, in their order."""

    def __post_init__(self) -> None:
        if len(self.students) != self.by.of:
            raise ValueError(
                f"there are {self.by.of} parts and {len(self.students)} students; give one student per part"
            )
        first, *others = (_sized(student) for student in self.students)
        if odd := [size for size in others if size != first]:
            raise ValueError(
                f"the students make clips of {first} and of {odd[0]} (frames, height, width, fps); train them alike"
            )

    @classmethod
    def open(cls, *runs: Path | str) -> Self:
        """Load the students of runs, in any order: folders with a result and the recipe that it was trained with, which says
        on which part (`data.part`). Text encoder and autoencoder are loaded once.

        ValueError for runs whose parts are not the parts of one partition, each once.
        """
        parts = {str(run): _part(Path(run)) for run in runs}
        rules = {part.by for part in parts.values()}
        if len(rules) != 1:
            raise ValueError(f"these students belong to {len(rules)} partitions, {rules}; give those of one")
        (by,) = rules
        order = sorted(parts, key=lambda run: parts[run].index)
        found = [parts[run].index for run in order]
        if found != list(range(by.of)):
            raise ValueError(
                f"these are the students of parts {found}, and there are {by.of} parts; give each part's student once"
            )
        first = VideoModel.from_pretrained(order[0])
        shared, students = {name: first.parts[name] for name in SHARED if name in first.parts}, [first]
        for run in order[1:]:
            card = Pretrained(source=run).card()
            for name in shared:
                if card.fingerprints.get(name) != first.card.fingerprints.get(name):
                    raise ValueError(f"{run} has another {name} than {order[0]}; train both from one model")
            alone = Pretrained(source=run).load(parts=("denoiser",))
            students.append(VideoModel(card, {**shared, "denoiser": alone.denoiser}))
        return cls(by=by, students=tuple(students))

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The part, and so the student, of each prompt."""
        return [self.by.part(prompt, self._encode) for prompt in prompts]

    def __call__(self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, **options: Any) -> Tensor:
        """Clips `[B, 3, F, H, W]` in [-1, 1], in the order of the prompts; `options` are those of `VideoModel`, for all clips."""
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of texts")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt")
        made: dict[int, Tensor] = {}
        routes = self.route(prompts)
        for part in sorted(set(routes)):
            rows = [row for row, its in enumerate(routes) if its == part]
            clips = self.students[part]([prompts[r] for r in rows], seed=[seeds[r] for r in rows], **options)
            made |= dict(zip(rows, clips, strict=True))
        return torch.stack([made[row] for row in range(len(prompts))])

    def to(self, place: str | torch.device) -> Self:
        """On another device, in place."""
        for student in self.students:
            student.to(place)
        return self

    def _encode(self, prompt: str) -> Cond:
        model = self.students[0]
        model.bring("text")
        with torch.no_grad():
            return model.text.encode([prompt])


def _sized(student: VideoModel) -> tuple[int, int, int, float]:
    card = student.card
    return card.num_frames, card.height, card.width, card.fps


def _part(run: Path) -> Part:
    """The part that the student in this folder was trained on."""
    if not (run / FILE).is_file():
        raise ValueError(
            f"{run} has no {FILE}, so nobody knows its part; give the folder of a run's result, such as RUN/student"
        )
    part = getattr(Recipe.load(run).data, "part", None)
    if part is None:
        raise ValueError(f"{run} was trained on all prompts; give students whose recipes have a data.part")
    return part  # type: ignore[no-any-return]
