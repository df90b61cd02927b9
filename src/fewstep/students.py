"""Several students, each for one part of the prompts: multi-student distillation (MSD, 2410.23274)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.core import Cond, dump
from fewstep.data.parts import Part, Partition
from fewstep.models.bundle import VideoModel
from fewstep.models.card import Card
from fewstep.models.source import Pretrained
from fewstep.recipe import Recipe
from fewstep.streaming import Video
from fewstep.written import FILE


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
        on which part (`data.part`). All networks but the denoiser are loaded once.

        ValueError for runs whose parts are not the parts of one partition, each once, and for a run of stages on several parts.
        """
        if not runs:
            raise ValueError("no runs are given; give the folder of a run for each part")
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
        cards = {run: Pretrained(source=run).card() for run in order}
        for run, card in cards.items():
            _require_one_part(run, card, parts[run])
            _require_shared(run, card, order[0], cards[order[0]])
        first = VideoModel.from_pretrained(order[0])
        shared, students = {name: part for name, part in first.parts.items() if name != "denoiser"}, [first]
        for run in order[1:]:
            alone = Pretrained(source=run).load(parts=("denoiser",))
            students.append(VideoModel(cards[run], {**shared, "denoiser": alone.denoiser}))
        return cls(by=by, students=tuple(students))

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The part, and so the student, of each prompt."""
        return [self.by.part(prompt, self._encode) for prompt in prompts]

    def __call__(self, prompts: Sequence[str], *, seed: int | Sequence[int] = 0, **options: Any) -> Tensor:
        """Clips `[B, 3, F, H, W]` in [-1, 1], in the order of the prompts; `options` are those of `VideoModel`.

        Images, videos and negative conditions are one for all clips, or one for each; other options are for all.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of texts")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt")
        made: dict[int, Tensor] = {}
        routes = self.route(prompts)
        for part in sorted(set(routes)):
            rows = [row for row, its in enumerate(routes) if its == part]
            own = {name: _own(name, option, rows, len(prompts)) for name, option in options.items()}
            clips = self.students[part]([prompts[r] for r in rows], seed=[seeds[r] for r in rows], **own)
            made |= dict(zip(rows, clips, strict=True))
        return torch.stack([made[row] for row in range(len(prompts))])

    def to(self, place: str | torch.device) -> Self:
        """On another device, in place."""
        for student in self.students:
            student.to(place)
        return self

    def _encode(self, prompts: Sequence[str]) -> Cond:
        model = self.students[0]
        model.bring("text")
        with torch.no_grad():
            return model.text.encode(prompts)


def _sized(student: VideoModel) -> tuple[int, int, int, float]:
    card = student.card
    return card.num_frames, card.height, card.width, card.fps


def _own(name: str, option: Any, rows: Sequence[int], count: int) -> Any:
    """An option for the clips in `rows` of `count`: what is one for each clip is cut, what is one for all stays."""
    if isinstance(option, Video):
        return replace(option, latents=lambda chunk: _own(name, option.latents(chunk), rows, count))
    if isinstance(option, Mapping):
        return {key: _cut(name, x, rows, count) if isinstance(x, Tensor) else x for key, x in option.items()}
    each = isinstance(option, Cond) or (isinstance(option, Tensor) and option.ndim > 3)
    return _cut(name, option, rows, count) if each else option


def _cut(name: str, told: Any, rows: Sequence[int], count: int) -> Any:
    if len(told) not in (1, count):
        raise ValueError(f"{name} has {len(told)} entries for {count} prompts; give one for all, or one for each")
    return told if len(told) == 1 else told[torch.tensor(rows)]


def _require_one_part(run: str, card: Card, part: Part) -> None:
    """ValueError for a student one of whose stages was trained on another part, or with another file of the partition."""
    by, here = dump(part, Part)["by"], part.by.content
    for key in (key for key in card.provenance if key.endswith("data settings")):
        stage, its = key.removesuffix("data settings"), json.loads(card.provenance[key]).get("part")
        if its is None or its["by"] != by:
            continue
        if its["index"] != part.index:
            raise ValueError(
                f"{run} was trained on part {part.index}, and a stage before on part {its['index']}; train it again with one "
                "data.part.index in all stages"
            )
        if (there := card.provenance.get(f"{stage}partition", "")) != here:
            raise ValueError(
                f"{run} was trained with another partition ({there or 'unknown'}) than the file of {part.by} has now ({here}); "
                "put back the file that all students were trained with, or train them again with this one"
            )


def _require_shared(run: str, card: Card, first: str, its: Card) -> None:
    """ValueError for a student whose other networks are not those of the first."""
    for name in sorted((card.parts.keys() | its.parts.keys()) - {"denoiser"}):
        if card.fingerprints.get(name) != its.fingerprints.get(name):
            raise ValueError(f"{run} has another {name} than {first}; train both from one model")


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
