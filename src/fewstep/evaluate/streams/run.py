"""Measure whether streams drift: make, measure and compare long clips, row by row; write `results.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from fewstep.core.atomic import replacing
from fewstep.core.lock import holding
from fewstep.core.stopping import saying
from fewstep.evaluate.features.extractors import FeatureMap, feature_map
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.evaluate.streams.clips import LongClips, Rendered, Sampled, Streamed, clips_of
from fewstep.evaluate.streams.figures import curve, distances, ratio_to
from fewstep.evaluate.streams.kept import KeptRolls, require_own
from fewstep.evaluate.streams.results import STRIPS, Claim, DriftReport, LongRow
from fewstep.evaluate.streams.rolling import READ, Progress, Rolled, roll
from fewstep.evaluate.streams.suite import DriftCases, DriftSuite
from fewstep.evaluate.streams.switching import Switch, rendered, switch
from fewstep.metrics.statistics import ENOUGH, difference_of_shares
from fewstep.models.bundle import VideoModel
from fewstep.models.runtime import effective
from fewstep.world.renderer import CANVAS

KEPT_ACCURACY = 0.95
"""Share of its first-window accuracy that a student should keep."""
MOTION_WITHIN = 0.2
"""Largest accepted difference from the teacher's motion, as a share of it."""


@dataclass(frozen=True)
class Bench:
    """An evaluation that is prepared: everything that rows share."""

    suite: DriftSuite
    cases: DriftCases
    frames: int
    """Frames per window."""
    features: FeatureMap
    model: VideoModel
    """Any of the models, for device and runtime."""

    @classmethod
    def of(cls, rows: Sequence[Sampled], suite: DriftSuite) -> Bench:
        """ValueError for rows that cannot be compared."""
        frames, model = _frames(rows), rows[0].model
        features = feature_map(suite.features, (CANVAS, CANVAS), model.device)
        features.check(frames, (CANVAS, CANVAS), model.device)
        return cls(suite, suite.cases(), frames, features, model)


def rows_of(students: Mapping[str, VideoModel], teacher: VideoModel, causal: VideoModel | None = None) -> list[Sampled]:
    """The rows of a fair comparison: students at their own steps; the undistilled causal model at the same steps; the teacher at
    its own steps, and at the least number of steps that gives a frame at least as many network evaluations as a student."""
    own = [clips_of(model, name, "student") for name, model in students.items()]
    rows = [*own]
    if causal is not None:
        counts = dict.fromkeys(row.contract.steps for row in own)
        rows += [clips_of(causal, f"causal {n}", "causal", n) for n in counts]
    contract = teacher.card.contract
    rows.append(clips_of(teacher, f"teacher {contract.steps}", "teacher"))
    wanted = {max(1, math.ceil(row.nfe_per_frame / contract.calls(1))) for row in own} - {contract.steps}
    rows += [clips_of(teacher, f"teacher {n}", "teacher", n) for n in sorted(wanted, reverse=True)]
    return rows


def measure_drift(
    rows: Sequence[Sampled], suite: DriftSuite, output: Path | str, progress: Progress | None = None
) -> DriftReport:
    """Measure every row on the same prompts and seeds; write `results.json` and film strips to `output`.

    Rows are those of `rows_of`: the students first. Real clips are added as the last row. If it is stopped and called again, it
    continues after the finished rows. ValueError for models that cannot be compared, or that do not make clips of the built-in
    world; FileExistsError if `output` has something else; NonFiniteError if a model makes NaN.
    """
    bench, output = Bench.of(rows, suite), Path(output)
    real = Rendered(num_frames=bench.frames, device=bench.model.device)
    every: list[LongClips] = [*rows, real]
    reference = replace(real, name="reference", draw=1)
    with holding(output):
        models = {row.name: f"{row.model.fingerprint('denoiser')}, {_steps(row)} steps" for row in rows}
        require_own(output, models, asdict(suite))
        store = KeptRolls.of([*every, reference], suite, bench.features.name, bench.model, output)
        with saying(store.said):
            rolled = {row.name: _rolled(row, bench, store, progress) for row in [*every, reference]}
            switches = list(_switches(rows, bench, progress)) if suite.switch else []
        report = _compared(every, rolled, bench, switches, models)
        with replacing(output / STRIPS) as draft:
            save_file({row.name: rolled[row.name].strips.contiguous() for row in every}, draft)
        report.save(output)
        store.delete()
    return report


def _steps(row: Sampled) -> int:
    return row.contract.steps if row.steps is None else row.steps


def _frames(rows: Sequence[Sampled]) -> int:
    """Frames per window; ValueError for rows that cannot be compared."""
    names = [row.name for row in rows]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"give at least one model, and a different name to each; got {names}")
    sizes = {(row.model.card.num_frames, row.model.card.height, row.model.card.width) for row in rows}
    if len(sizes) > 1 or {size[1:] for size in sizes} != {(CANVAS, CANVAS)}:
        raise ValueError(
            f"drift is measured on the built-in world, whose clips are {CANVAS} x {CANVAS}, with models of one length; these "
            f"models make (frames, height, width) {sorted(sizes)}"
        )
    ((frames, _, _),) = sizes
    if frames < 3:
        raise ValueError(f"windows must have at least 3 frames, for flicker; these models' clips have {frames}")
    if len({row.model.device for row in rows}) > 1:
        raise ValueError("the models are on different devices; move them to one with model.to(device)")
    return frames


def _rolled(row: LongClips, bench: Bench, store: KeptRolls, progress: Progress | None) -> Rolled:
    found = store.read(row.name)
    if found is None:
        found = roll(row, bench.cases, bench.suite, bench.features, progress)
        store.write(row.name, found)
    return found


def _switches(rows: Sequence[Sampled], bench: Bench, progress: Progress | None) -> Iterator[Switch]:
    """The students' switched prompts, and those of rendered clips; nothing if no student streams."""
    students = [row for row in rows if isinstance(row, Streamed) and row.role == "student"]
    for row in students:
        yield from switch(row, bench.cases, bench.suite, progress)
    if students:
        yield from rendered(bench.cases, bench.frames)


def _compared(
    rows: Sequence[LongClips],
    rolled: Mapping[str, Rolled],
    bench: Bench,
    switches: Sequence[Switch],
    models: dict[str, str],
) -> DriftReport:
    made = [_row(row, rolled[row.name], rolled["reference"], bench) for row in rows]
    return DriftReport(
        rows=tuple(made),
        claims=tuple(_claims(made, rolled, bench)),
        switches=tuple(switches),
        frames=bench.frames,
        fps=bench.model.card.fps,
        prompts=bench.cases.prompts,
        seeds=bench.cases.seeds,
        features=bench.features.name,
        suite=asdict(bench.suite) | {"times": list(bench.suite.times)},
        models=models,
        machine=asdict(describe_machine(bench.model.device)),
        versions=versions(),
        runtime=effective(bench.model),
        notes=tuple(_notes(made, bench.suite)),
    )


def _row(row: LongClips, mine: Rolled, reference: Rolled, bench: Bench) -> LongRow:
    seeds, windows, times = bench.cases.seeds_per_prompt, mine.features.shape[1], bench.suite.times
    curves = {
        name: curve(values, seeds, bench.frames, times, share=name in READ) for name, values in mine.measures.items()
    }
    distance = distances(mine.features, reference.features[:, :windows], seeds, bench.frames, times)
    return LongRow(
        name=row.name, role=row.role, kind=row.kind, nfe_per_frame=row.nfe_per_frame,
        curves=curves | ({} if distance is None else {"Frechet": distance}),
        right=tuple(tuple(map(int, clip)) for clip in mine.measures["accuracy"].tolist()),
    )  # fmt: skip


def _claims(rows: Sequence[LongRow], rolled: Mapping[str, Rolled], bench: Bench) -> Iterator[Claim]:
    """What each student is held to, at the longest clips."""
    teachers, last = [row for row in rows if row.role == "teacher"], bench.suite.count
    for row in rows:
        if row.role != "student" or row.kind != "stream":
            continue
        kept = row.curves["accuracy"].kept[-1]
        yield Claim(
            row=row.name, text=f"share of its first-window accuracy that is left at {last}x",
            value=kept.ratio, interval=kept.interval, low=KEPT_ACCURACY,
        )  # fmt: skip
        mine = {name: bench.cases.by_prompt(rolled[row.name].measures[name][:, -1]) for name in ("motion", "accuracy")}
        if not teachers:
            continue
        its = bench.cases.by_prompt(rolled[teachers[0].name].measures["motion"][:, 0])
        value, interval = ratio_to(mine["motion"], its)
        yield Claim(
            row=row.name, text=f"motion at {last}x, relative to {teachers[0].name}", value=value,
            interval=interval, low=1 - MOTION_WITHIN, high=1 + MOTION_WITHIN,
        )  # fmt: skip
        equal = min(
            (t for t in teachers if t.nfe_per_frame >= row.nfe_per_frame),
            key=lambda t: t.nfe_per_frame,
            default=teachers[0],
        )
        right = bench.cases.by_prompt(rolled[equal.name].measures["accuracy"][:, 0])
        between = difference_of_shares(mine["accuracy"], right)
        yield Claim(
            row=row.name, text=f"accuracy at {last}x minus that of {equal.name} ({equal.nfe_per_frame:g} calls per frame)",
            value=float((mine["accuracy"] - right).mean()), interval=(between.low, between.high), low=0.0,
        )  # fmt: skip


def _notes(rows: Sequence[LongRow], suite: DriftSuite) -> Iterator[str]:
    """What a reader must know before quoting a figure."""
    if any(row.kind == "new clips" for row in rows):
        yield (
            "Models of whole clips make every window from new noise, so they cannot drift: one window is measured, and no "
            "window continues another one."
        )
    if suite.prompts < ENOUGH:
        yield f"Intervals: wide and not reliable, because {suite.prompts} prompts are few; use {ENOUGH} or more."
    clips = suite.prompts * suite.seeds_per_prompt
    yield f"Frechet: {clips} clips per window are few, so values are biased upwards. Compare with the row of real clips only."
