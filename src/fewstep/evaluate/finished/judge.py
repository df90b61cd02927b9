"""Compare finished videos with the reference's: read, measure, judge, write results and page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.core.atomic import write_text
from fewstep.core.lock import holding
from fewstep.data.base import DataError
from fewstep.evaluate.features.extractors import FeatureMap, feature_map
from fewstep.evaluate.finished.figures import VLITE, Figures, Measured, mean, measure, small, vlite
from fewstep.evaluate.finished.findings import Finding, find, verdict
from fewstep.evaluate.finished.matching import Matched, match
from fewstep.evaluate.finished.players import begin, require_free, write_player
from fewstep.evaluate.finished.reading import Format, Progress, changes, look_at, meet, read
from fewstep.evaluate.inputs import require_transformers
from fewstep.evaluate.machine import versions
from fewstep.metrics import frechet, frechet_without, jackknife, split_half
from fewstep.metrics.statistics import ENOUGH, FEWEST

if TYPE_CHECKING:
    from fewstep.evaluate.features.clip_score import Clip

FILE = "results.json"
KIND = "fewstep compare"
FEWEST_TO_MEASURE_DISTANCE = 4
STILL = 16
"""Frames of the still picture among the controls."""
CPU = torch.device("cpu")


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
class Shown:
    """One file, as it was compared with the reference's."""

    file: str
    player: str
    """The copy for the page, below its folder."""
    format: str
    """Its own size, rate and number of frames."""
    seconds: float
    compared_in: str
    """The format in which it and the reference's were measured."""
    changes: tuple[str, ...]
    """What was resampled for that, of this file or of the reference's."""
    figures: Figures
    reference: Figures
    """The reference's figures in the same format."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """The files of all sides that show the same thing, in the order of the sides."""

    name: str
    prompt: str
    sides: tuple[Shown, ...]


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
    formats = look_at(matched.cases, progress)
    bench = _Bench(options, any(case.prompt for case in matched.cases))
    with holding(output):
        begin(output, FILE, KIND)
        videos = []
        for number, own in enumerate(formats):
            videos.append(bench.video(number, matched, own, output))
            if progress is not None:
                progress("videos", number + 1, len(matched.cases))
        found = _judged(matched, videos, bench, [str(path) for path in paths])
        write_text(output / FILE, json.dumps(asdict(found), indent=2) + "\n")
    return found


@dataclass(frozen=True)
class _Look:
    """What was found in one file, in one format."""

    measured: Measured
    features: Tensor | None


class _Bench:
    """The extractors, and what they found so far."""

    def __init__(self, options: Options, prompted: bool) -> None:
        self.options, self.prompted = options, prompted
        self.map: FeatureMap | None = feature_map(options.features, (0, 0), CPU) if options.features else None
        self.clip = _clip(options.clip) if options.clip else None
        self.features: list[list[tuple[Tensor | None, Tensor | None]]] = []
        """By video, by side: features of the file, and of the reference's in the same format."""
        self.controls: dict[str, list[Figures]] = {"a still picture": [], "frames shuffled": []}

    def video(self, number: int, matched: Matched, own: Sequence[Format], output: Path) -> Video:
        """Measure the files of one case, and write their copies for the page.

        Each file meets the reference's in a format of the two alone, so that a small or slow side does not hide what is wrong
        with another one.
        """
        case, most = matched.cases[number], self.options.num_frames
        text = None if self.clip is None or not case.prompt else self.clip.prompt(case.prompt)
        references: dict[Format, _Look] = {}
        shown, rows = [], []
        for side, (path, its) in enumerate(zip(case.files, own, strict=True)):
            wanted, whole = meet((own[0], its), most), meet((its,), most)
            frames = read(path, its, whole)
            player = write_player(output, side, number, frames, its.fps)
            if whole != wanted:
                del frames  # one video at a time
                frames = read(path, its, wanted)
            mine = self._look(frames, wanted, text)
            if side == 0:
                references[wanted] = mine
                self._control(frames, wanted.fps, mine.measured, number)
            del frames
            if wanted not in references:
                references[wanted] = self._look(read(case.files[0], own[0], wanted), wanted, text)
            told = [("", changes(its, wanted, most)), (f"{matched.sides[0]}: ", changes(own[0], wanted, most))]
            shown.append(Shown(
                file=str(path), player=player, format=str(its), seconds=its.seconds, compared_in=str(wanted),
                changes=tuple(f"{who}{what}" for who, each in told[: 1 if side == 0 else 2] for what in each),
                figures=mine.measured.figures, reference=references[wanted].measured.figures,
            ))  # fmt: skip
            rows.append((mine.features, references[wanted].features))
        self.features.append(rows)
        return Video(name=case.name, prompt=case.prompt, sides=tuple(shown))

    def _look(self, frames: Tensor, wanted: Format, text: Tensor | None) -> _Look:
        measured = measure(frames, wanted.fps, self.clip, text)
        if self.map is None:
            return _Look(measured, None)
        with torch.inference_mode():
            return _Look(measured, self.map.map(small(frames)).double().cpu())

    def _control(self, frames: Tensor, fps: float | None, found: Measured, number: int) -> None:
        """The VBench-like measures of a still picture, and of the frames in random order."""
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(number))
        for name, chosen in {"a still picture": torch.zeros_like(order[:STILL]), "frames shuffled": order}.items():
            embeddings = None if found.embeddings is None else found.embeddings[chosen]
            self.controls[name].append(vlite(frames, fps, embeddings, chosen))


def _clip(folder: str) -> Clip:
    require_transformers("CLIPScore")
    from fewstep.evaluate.features.clip_score import Clip

    return Clip(Path(folder), CPU)


def _judged(matched: Matched, videos: Sequence[Video], bench: _Bench, paths: Sequence[str]) -> Comparison:
    names = [video.name for video in videos]
    findings = []
    for i, side in enumerate(matched.sides[1:], 1):
        pairs = [video.sides[i] for video in videos]
        findings.append(find(side, names, [one.figures for one in pairs], [one.reference for one in pairs]))
    options = asdict(bench.options) | {"prompt_file": str(bench.options.prompt_file or "")}
    return Comparison(
        sides=matched.sides,
        verdict=tuple(line for found in findings for line in verdict(found, matched.sides[0])),
        findings=tuple(finding for found in findings for finding in found),
        distances=tuple(_distances(matched.sides, bench)),
        controls={
            control: {f"vlite.{name}": mean(rows, f"vlite.{name}") for name in VLITE}
            for control, rows in bench.controls.items()
        },
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
    for i, side in enumerate(sides[1:], 1):
        own, reference = (torch.cat([rows[i][which] for rows in bench.features]) for which in (0, 1))  # type: ignore[misc]
        value = frechet(own, reference)
        low, high = jackknife(value, frechet_without(own, reference))
        floor = split_half(reference, torch.Generator().manual_seed(0))
        yield Distance(side=side, value=value, interval=(max(0.0, low), high), n=len(own), floor=floor)


def _notes(matched: Matched, videos: Sequence[Video], bench: _Bench) -> Iterator[str]:
    """What a reader must know before quoting a figure."""
    yield f"Videos are matched {matched.how}."
    yield from matched.left_out
    for i, side in enumerate(matched.sides[1:], 1):
        if changed := [video.sides[i] for video in videos if video.sides[i].changes]:
            yield (
                f"{side}: size, rate or length differ from the reference's in {len(changed)} of {len(videos)} videos, so the two "
                f"are compared in the smaller of each ({changed[0].compared_in} in {changed[0].file})."
            )
    if len(videos) < FEWEST:
        yield "Intervals: none, because one video says nothing about other videos."
    elif len(videos) < ENOUGH:
        yield f"Intervals: wide and not reliable, because {len(videos)} videos are few; give {ENOUGH} or more."
    if all(video.sides[0].figures["motion"] is None for video in videos):
        yield "Motion, flicker, drift, frozen frames, cuts and repetition: not measured, because these are pictures."
    if bench.map is not None and len(videos) < FEWEST_TO_MEASURE_DISTANCE:
        yield f"Distance: not measured, because it needs {FEWEST_TO_MEASURE_DISTANCE} videos, and there are {len(videos)}."
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
