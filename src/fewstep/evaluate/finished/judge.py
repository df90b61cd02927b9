"""Compare finished videos with the reference's: read, measure, judge, write results and page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.core.atomic import write_text
from fewstep.core.lock import holding
from fewstep.data.base import DataError
from fewstep.evaluate.features.extractors import FeatureMap, feature_map
from fewstep.evaluate.finished.figures import VLITE, Figures, Measured, measure, small, vlite
from fewstep.evaluate.finished.findings import Finding, find, verdict
from fewstep.evaluate.finished.matching import Matched, match
from fewstep.evaluate.finished.players import begin, require_free, write_player
from fewstep.evaluate.finished.reading import Format, changes, look_at, meet, read
from fewstep.evaluate.inputs import require_transformers
from fewstep.evaluate.machine import versions
from fewstep.metrics import frechet, frechet_without, jackknife, split_half
from fewstep.metrics.statistics import ENOUGH, FEWEST

if TYPE_CHECKING:
    from fewstep.evaluate.features.clip_score import Clip

FILE = "results.json"
KIND = "fewstep compare"
FEWEST_TO_MEASURE_DISTANCE = 4
CPU = torch.device("cpu")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and on which frames."""

    prompt_file: Path | None = None
    """Prompts of the videos, which also match them (`matching.match`)."""
    features: str = ""
    """Feature extractor of the Frechet distance (`extractors.feature_map`); empty: no distance."""
    clip: str = ""
    """Folder of a CLIP model, for CLIPScore and consistency; empty: neither."""
    num_frames: int | None = None
    """Compare at most so many frames from the beginning; None: all."""
    allow_missing: bool = False
    """Leave out files without a partner, and say so; otherwise they are refused."""

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")


@dataclass(frozen=True, kw_only=True)
class Video:
    """The videos of all sides that show the same thing, in the order of the sides."""

    name: str
    prompt: str
    files: tuple[str, ...]
    format: str
    """In which they were compared."""
    changes: tuple[str, ...]
    """What was resampled, one sentence per file."""
    figures: tuple[Figures, ...]
    players: tuple[str, ...]
    """Copies for the page, below its folder."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Frechet distance of a side to the reference."""

    side: str
    value: float
    interval: tuple[float, float] | None
    """95 % interval: jackknife over videos. It covers the variance at this n, not the bias."""
    n: int
    floor: float
    """Distance between two halves of the reference: what equal videos may have with half as many."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was found; saved as `results.json`."""

    kind: str = KIND
    sides: tuple[str, ...]
    """The first is the reference."""
    verdict: tuple[str, ...]
    findings: tuple[Finding, ...]
    distances: tuple[Distance, ...]
    controls: dict[str, Figures]
    """Means of the VBench-like measures over still pictures (the reference's first frames) and over the reference's frames in
    random order."""
    videos: tuple[Video, ...]
    notes: tuple[str, ...]
    paths: tuple[str, ...]
    matched: str
    features: str | None
    clip: str | None
    options: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)

    def of(self, side: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.side == side)


def compare_videos(
    sides: Sequence[Path | str], output: Path | str, options: Options | None = None, progress: Progress | None = None
) -> Comparison:
    """Compare finished videos; the first folder or file is the reference. Write `results.json`, `compare.html`, `videos/`.

    Any tool may have made them. Every file is read once before anything is measured. DataError for files that cannot be
    matched or read; FileExistsError if `output` has something else in it.
    """
    options, output = options or Options(), Path(output)
    paths = [Path(side) for side in sides]
    matched = match(paths, options.prompt_file, allow_missing=options.allow_missing)
    require_free(output, paths, FILE, KIND)
    formats = look_at(matched.cases)
    bench = _Bench(options, any(case.prompt for case in matched.cases))
    with holding(output):
        begin(output, FILE, KIND)
        videos = []
        for number, (case, own) in enumerate(zip(matched.cases, formats, strict=True)):
            videos.append(bench.video(number, matched, own, output))
            if progress is not None:
                progress("videos", number + 1, len(matched.cases))
        found = _judged(matched, videos, bench, [str(path) for path in paths])
        write_text(output / FILE, json.dumps(asdict(found), indent=2) + "\n")
    return found


class _Bench:
    """The extractors, and what they found so far."""

    def __init__(self, options: Options, prompted: bool) -> None:
        self.options, self.prompted = options, prompted
        self.map: FeatureMap | None = feature_map(options.features, (0, 0), CPU) if options.features else None
        self.clip = _clip(options.clip) if options.clip else None
        self.features: list[list[Tensor]] = []
        """By video, by side."""
        self.controls: dict[str, list[Figures]] = {"a still picture": [], "frames shuffled": []}

    def video(self, number: int, matched: Matched, own: Sequence[Format], output: Path) -> Video:
        """Measure the files of one case, and write their copies for the page."""
        case, wanted = matched.cases[number], meet(own, self.options.num_frames)
        text = None if self.clip is None or not case.prompt else self.clip.prompt(case.prompt)
        figures, players, changed, rows = [], [], [], []
        for side, (path, its) in enumerate(zip(case.files, own, strict=True)):
            frames = read(path, its, wanted)
            found = measure(frames, wanted.fps, self.clip, text)
            if side == 0:
                self._control(frames, wanted.fps, found, number)
            if self.map is not None:
                with torch.inference_mode():
                    rows.append(self.map.map(small(frames)).double().cpu())
            figures.append(found.figures)
            players.append(write_player(output, side, number, frames, wanted.fps))
            if what := changes(its, wanted):
                changed.append(f"{matched.sides[side]}: {', '.join(what)}")
        self.features.append(rows)
        return Video(
            name=case.name, prompt=case.prompt, files=tuple(map(str, case.files)), format=str(wanted),
            changes=tuple(changed), figures=tuple(figures), players=tuple(players),
        )  # fmt: skip

    def _control(self, frames: Tensor, fps: float | None, found: Measured, number: int) -> None:
        """The VBench-like measures of a still picture, and of the frames in random order."""
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(number))
        for name, chosen in {"a still picture": torch.zeros_like(order), "frames shuffled": order}.items():
            embeddings = None if found.embeddings is None else found.embeddings[chosen]
            self.controls[name].append(vlite(frames[chosen], fps, embeddings))


def _clip(folder: str) -> Clip:
    require_transformers("CLIPScore")
    from fewstep.evaluate.features.clip_score import Clip

    return Clip(Path(folder), CPU)


def _judged(matched: Matched, videos: Sequence[Video], bench: _Bench, paths: Sequence[str]) -> Comparison:
    names = [video.name for video in videos]
    by_side = [[video.figures[i] for video in videos] for i in range(len(matched.sides))]
    findings = [find(side, names, mine, by_side[0]) for side, mine in zip(matched.sides[1:], by_side[1:])]
    options = asdict(bench.options) | {"prompt_file": str(bench.options.prompt_file or "")}
    return Comparison(
        sides=matched.sides,
        verdict=tuple(line for found in findings for line in verdict(found, matched.sides[0])),
        findings=tuple(finding for found in findings for finding in found),
        distances=tuple(_distances(matched.sides, bench)),
        controls={name: _means(rows) for name, rows in bench.controls.items()},
        videos=tuple(videos),
        notes=tuple(_notes(matched, videos, bench)),
        paths=tuple(paths),
        matched=matched.how,
        features=None if bench.map is None else bench.map.name,
        clip=None if bench.clip is None else bench.clip.name,
        options=options,
    )


def _distances(sides: Sequence[str], bench: _Bench) -> Iterator[Distance]:
    if bench.map is None or len(bench.features) < FEWEST_TO_MEASURE_DISTANCE:
        return
    sets = [torch.cat([rows[i] for rows in bench.features]) for i in range(len(sides))]
    floor = split_half(sets[0], torch.Generator().manual_seed(0))
    for side, own in zip(sides[1:], sets[1:]):
        value = frechet(own, sets[0])
        low, high = jackknife(value, frechet_without(own, sets[0]))
        yield Distance(side=side, value=value, interval=(max(0.0, low), high), n=len(own), floor=floor)


def _means(rows: Sequence[Figures]) -> Figures:
    """Mean of each VBench-like measure over the videos that have it."""
    found: Figures = {}
    for name in (f"vlite.{name}" for name in VLITE):
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = sum(values) / len(values) if values else None  # type: ignore[arg-type]
    return found


def _notes(matched: Matched, videos: Sequence[Video], bench: _Bench) -> Iterator[str]:
    """What a reader must know before quoting a figure."""
    yield f"Videos are matched {matched.how}."
    yield from matched.left_out
    if changed := sum(bool(video.changes) for video in videos):
        yield f"Size, rate or length differ in {changed} of {len(videos)} videos. They are compared in the smallest of each; the " \
              "list of videos says what was resampled."
    if len(videos) < FEWEST:
        yield "Intervals: none, because one video says nothing about other videos."
    elif len(videos) < ENOUGH:
        yield f"Intervals: wide and not reliable, because {len(videos)} videos are few; give {ENOUGH} or more."
    if all(video.figures[0]["motion"] is None for video in videos):
        yield "Motion, flicker, drift, frozen frames, cuts and repetition: not measured, because these are pictures."
    if bench.map is not None and len(videos) < FEWEST_TO_MEASURE_DISTANCE:
        yield f"Distance: not measured, because it needs {FEWEST_TO_MEASURE_DISTANCE} videos or more, and there are {len(videos)}."
    elif bench.map is not None:
        yield f"Distance: with {len(videos)} videos it is biased upwards. Compare it only at equal n and features."
    if bench.clip is not None and not bench.prompted:
        yield "CLIPScore: not measured, because the prompts are not known; give --prompt-file."
    if bench.clip is not None and bench.clip.cut:
        yield f"CLIPScore: {bench.clip.cut} prompts are too long for CLIP and were cut."


def load(folder: Path | str) -> dict[str, Any]:
    """The tree of a `results.json`. DataError if another command wrote it."""
    tree: dict[str, Any] = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    if tree.get("kind") != KIND:
        raise DataError(f"{folder}/{FILE} was not written by fewstep compare; give its output folder")
    if "findings" not in tree:
        raise DataError(f"{folder}: this comparison was stopped before its end; run the same command again")
    return tree
