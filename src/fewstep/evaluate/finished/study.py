"""A blind user study: people see two videos side by side and say which one they prefer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.core.atomic import write_text
from fewstep.core.lock import holding
from fewstep.data.base import DataError
from fewstep.evaluate.finished.matching import match
from fewstep.evaluate.finished.players import begin, require_free, write_copy
from fewstep.evaluate.finished.reading import Progress, look_at, meet, read

KEY = "key.json"
"""Which copy is whose. It lies outside the folder that raters get."""
RATERS = "page"
KIND = "fewstep study"
COPIES = ("p", "q")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two copies of one case, `NNN-p` and `NNN-q`."""

    name: str
    prompt: str
    p: int
    """Side whose copy is p, 0 or 1; q is the other one."""
    files: tuple[str, str]
    """Copies p and q, below the raters' folder."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `key.json` holds."""

    kind: str = KIND
    id: str
    """Of the pairs and the seed; answers name it, so that they are not read for another study."""
    sides: tuple[str, str]
    questions: tuple[str, ...]
    seed: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How a study is made."""

    questions: tuple[str, ...] = ("Which video do you prefer?",)
    prompt_file: Path | None = None
    pairs: int | None = None
    """Number of pairs, drawn by the seed; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if not self.questions or any(not question.strip() for question in self.questions):
            raise ValueError("give at least one question, and no empty one")


def make_study(
    sides: Sequence[Path | str],
    output: Path | str,
    options: StudyOptions | None = None,
    progress: Progress | None = None,
) -> Study:
    """Write copies of both sides' videos under names that tell nothing to `page/videos/`, and `key.json` beside `page/`.

    Both copies of a pair have one size, rate and length, so that these do not give a side away. Half of the pairs have the
    first side as copy p; the page swaps left and right again for each rater. `write_study_page` makes the page. Errors as for
    `compare_videos`; DataError for other than two sides.
    """
    options, output = options or StudyOptions(), Path(output)
    paths = [Path(side) for side in sides]
    if len(paths) != 2:
        raise DataError(f"a study compares two folders; got {len(paths)}")
    matched = match(paths, options.prompt_file)
    count = len(matched.cases) if options.pairs is None else options.pairs
    if count > len(matched.cases):
        raise DataError(f"--pairs {count}: there are only {len(matched.cases)} pairs; give a smaller number")
    require_free(output, paths, KEY, KIND)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = [matched.cases[i] for i in torch.randperm(len(matched.cases), generator=generator)[:count].tolist()]
    formats = look_at(chosen, progress)
    first = (torch.randperm(count, generator=generator) % 2).tolist()
    pairs = []
    with holding(output):
        begin(output, KEY, KIND, RATERS)
        for number, (case, own, p) in enumerate(zip(chosen, formats, first, strict=True)):
            wanted, files = meet(own), []
            for copy, side in zip(COPIES, (p, 1 - p), strict=True):
                frames = read(case.files[side], own[side], wanted)
                files.append(write_copy(output / RATERS, f"videos/{number + 1:03d}-{copy}", frames, wanted.fps))
            pairs.append(Pair(name=case.name, prompt=case.prompt, p=p, files=(files[0], files[1])))
            if progress is not None:
                progress("pairs", number + 1, count)
        study = Study(
            id=_digest(matched.sides, pairs, options), sides=(matched.sides[0], matched.sides[1]),
            questions=options.questions, seed=options.seed, pairs=tuple(pairs),
        )  # fmt: skip
        write_text(output / KEY, json.dumps(asdict(study), indent=2) + "\n")
    return study


def load_study(folder: Path | str) -> Study:
    """Read `key.json`. DataError if there is none, or if the study was not finished."""
    path = Path(folder) / KEY
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pairs = tuple(Pair(**{**pair, "files": tuple(pair["files"])}) for pair in tree["pairs"])
        return Study(**{**tree, "pairs": pairs, "sides": tuple(tree["sides"]), "questions": tuple(tree["questions"])})
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the output folder of fewstep study") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} is damaged, or its study was stopped; make the study again") from None


def _digest(sides: Sequence[str], pairs: Sequence[Pair], options: StudyOptions) -> str:
    facts = json.dumps([list(sides), [asdict(pair) for pair in pairs], list(options.questions), options.seed])
    return f"s{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}"  # a number would not survive a spreadsheet
