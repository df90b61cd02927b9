"""The answers of a blind study: read from raters' CSV files, and turned into a preference with its interval."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fewstep.data.base import DataError
from fewstep.evaluate.finished.study import COPIES, Study
from fewstep.metrics.statistics import ENOUGH, FEWEST, clustered_wilson

COLUMNS = ("study", "rater", "question", "pair", "left", "choice", "seconds")
SAME = "same"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """One choice of one rater."""

    rater: str
    question: int
    pair: int
    score: float
    """1: the second side is preferred; 0: the first; 0.5: no difference."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """How often raters prefer the second side, for one question."""

    question: str
    share: float
    """Mean over videos of the share of answers for the second side; "no difference" counts as half."""
    by_videos: Interval | None
    """95 % interval over videos (`clustered_wilson`): what other videos would give; None with a single one."""
    by_raters: Interval | None
    """95 % interval over raters: what other raters would give; None with a single one."""
    answers: int
    same: int
    """Answers "no difference"."""
    videos: int
    raters: int

    @property
    def interval(self) -> Interval | None:
        """The wider of the two intervals; None if neither exists."""
        known = [ends for ends in (self.by_videos, self.by_raters) if ends is not None]
        return max(known, key=lambda ends: ends[1] - ends[0], default=None)

    @property
    def verdict(self) -> Literal["second", "first", "unclear"]:
        """The side that is preferred, if the interval excludes one half."""
        if self.interval is None:
            return "unclear"
        low, high = self.interval
        return "second" if low > 0.5 else "first" if high < 0.5 else "unclear"


def read_answers(files: Sequence[Path], study: Study) -> list[Answer]:
    """The answers in CSV files that the page saved. A row that is in two files counts once.

    DataError for a file that is no such table, belongs to another study, or has two different answers of one rater to one
    question and pair.
    """
    found: dict[tuple[str, int, int], Answer] = {}
    for path in files:
        for number, row in enumerate(_rows(path), 2):
            answer = _answer(row, study, f"{path}, line {number}")
            key = (answer.rater, answer.question, answer.pair)
            if found.setdefault(key, answer) != answer:
                raise DataError(
                    f"{path}, line {number}: rater {answer.rater} has answered question {answer.question} of pair "
                    f"{answer.pair} twice, and differently; keep one of the files"
                )
    if not found:
        raise DataError("the files have no answers; ask the raters to save theirs on the last page")
    return list(found.values())


def preferences(answers: Sequence[Answer], study: Study) -> list[Preference]:
    """One preference per question that was answered."""
    found = []
    for number, question in enumerate(study.questions, 1):
        if own := [answer for answer in answers if answer.question == number]:
            found.append(_preference(question, own))
    return found


def told(found: Sequence[Preference], study: Study) -> Iterator[str]:
    """The result in plain sentences."""
    first, second = study.sides
    for one in found:
        ends = "" if one.interval is None else f" [{100 * one.interval[0]:.0f}, {100 * one.interval[1]:.0f}]"
        yield (
            f"{one.question} {second} rather than {first} in {100 * one.share:.0f} % of the answers{ends}; "
            f"{one.answers} answers of {one.raters} raters on {one.videos} videos, {one.same} of them no difference (half)."
        )
        if one.interval is None:
            yield "No interval: one rater and one video say nothing about others."
        elif one.verdict == "unclear":
            yield "This does not show which one is preferred: the interval contains 50 %."
        else:
            yield f"{second if one.verdict == 'second' else first} is preferred."
        if one.raters < FEWEST:
            yield "The interval is over videos only: one rater says nothing about other raters."
        elif min(one.raters, one.videos) < ENOUGH:
            yield f"Interval: wide and not reliable with few raters or videos; have {ENOUGH} or more of each."


def _preference(question: str, own: Sequence[Answer]) -> Preference:
    by_video, by_rater = (_groups([(getattr(a, key), a.score) for a in own]) for key in ("pair", "rater"))
    return Preference(
        question=question, share=float(by_video.mean()), by_videos=_interval(by_video, len(own)),
        by_raters=_interval(by_rater, len(own)), answers=len(own), same=sum(a.score == 0.5 for a in own),
        videos=len(by_video), raters=len(by_rater),
    )  # fmt: skip


def _groups(scores: Sequence[tuple[object, float]]) -> torch.Tensor:
    """Mean score of every group."""
    groups: dict[object, list[float]] = {}
    for group, score in scores:
        groups.setdefault(group, []).append(score)
    return torch.tensor([sum(own) / len(own) for own in groups.values()], dtype=torch.float64)


def _interval(shares: torch.Tensor, answers: int) -> Interval | None:
    if len(shares) < FEWEST:
        return None
    low, high = clustered_wilson(shares, max(1, answers // len(shares)))
    return (low, high)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
                raise DataError(
                    f"{path} lacks the columns {', '.join(missing)}; give a file that the study's page saved"
                )
            return list(table)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the CSV files that the raters saved") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is not a table of answers ({error}); give a file that the study's page saved"
        ) from None


def _answer(row: dict[str, str], study: Study, where: str) -> Answer:
    if row["study"] != study.id:
        raise DataError(f"{where}: these are answers to another study ({row['study']}, not {study.id}); leave them out")
    numbers = {"question": len(study.questions), "pair": len(study.pairs)}
    for name, count in numbers.items():
        if not (row[name] or "").isdecimal() or not 1 <= int(row[name]) <= count:
            raise DataError(f"{where}: {name} must be a number from 1 to {count}, got {row[name]!r}")
    if row["choice"] not in (*COPIES, SAME) or not row["rater"]:
        raise DataError(f"{where}: choice must be {', '.join(COPIES)} or {SAME}, with a rater; got {row['choice']!r}")
    pair = study.pairs[int(row["pair"]) - 1]
    side = pair.p if row["choice"] == "p" else 1 - pair.p
    score = 0.5 if row["choice"] == SAME else float(side)
    return Answer(row["rater"], int(row["question"]), int(row["pair"]), score)
