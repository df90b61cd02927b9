"""Evaluate models: sample, measure, compare, write the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fewstep.core.atomic import replacing
from fewstep.core.lock import holding
from fewstep.core.stopping import saying
from fewstep.evaluate.compare import Distance, make_row, with_gains
from fewstep.evaluate.cost import cost
from fewstep.evaluate.kept import KeptRows, require_own
from fewstep.evaluate.machine import describe_machine, versions
from fewstep.evaluate.measure import Measured
from fewstep.evaluate.real import Drawn
from fewstep.evaluate.results import CLIPS, Report
from fewstep.evaluate.sampling import Bench, Progress, prepare, sample
from fewstep.evaluate.suite import Entry, Suite
from fewstep.evaluate.target import Target, make_target
from fewstep.metrics.statistics import ENOUGH, FEWEST
from fewstep.models.runtime import effective
from fewstep.world.grammar import ATTRIBUTES


def evaluate(rows: Sequence[Entry], suite: Suite, output: Path | str, progress: Progress | None = None) -> Report:
    """Measure every entry on the same prompts, seeds and noise. Write `results.json` and the preview clips to `output`.

    Give the teacher at its full number of steps first (the reference), then the teacher at the student's step counts (the
    baseline that any distillation must beat), then the student. `write_report(output)` makes the page. If it is stopped and
    called again, it continues after the finished rows. ValueError for entries that cannot be compared; FileExistsError if
    `output` has figures or pages of something else; NonFiniteError if a model makes NaN.
    """
    output = Path(output)
    with holding(output):
        bench = prepare(rows, suite)
        models = {entry.name: entry.model.fingerprint("denoiser") for entry in rows}
        asked = asdict(suite) | {
            "texts": list(suite.texts), "num_frames": bench.num_frames, "fps": rows[0].model.card.fps,
            "dtype": bench.runtime.dtype,
        }  # fmt: skip
        require_own(output, models, asked)
        kept = KeptRows.of(rows, bench, output)
        with saying(kept.said):
            measured = measure(rows, bench, kept, progress)
            report = compare(rows, bench, measured, models, asked)
        report.save(output)
        with replacing(output / CLIPS) as draft:
            save_file({n: m.shown.contiguous() for n, m in measured.items() if m.shown is not None}, draft)
        kept.delete()
    return report


def measure(rows: Sequence[Entry], bench: Bench, kept: KeptRows, progress: Progress | None) -> dict[str, Measured]:
    """Sample and store every row, except the rows that a stopped evaluation has stored."""
    measured: dict[str, Measured] = {}
    for entry in rows:
        found = kept.read(entry.name)
        if found is None:
            found = sample(entry, bench, progress)
            kept.write(entry.name, found)
        measured[entry.name] = found
    return measured


def compare(
    rows: Sequence[Entry],
    bench: Bench,
    measured: Mapping[str, Measured],
    models: Mapping[str, str],
    asked: Mapping[str, Any],
) -> Report:
    """The report: rows with their costs, their distances, and each student's gain over its teacher."""
    suite = bench.suite
    costs = {entry.name: cost(entry, bench) for entry in rows}
    name = suite.reference or rows[0].name
    reference = measured[name]
    target = make_target(bench, name, reference)
    distances = {entry.name: Distance.measure(measured[entry.name], target.features, bench) for entry in rows}
    made = [make_row(e, measured[e.name], reference, distances[e.name], bench, costs[e.name]) for e in rows]
    return Report(
        rows=with_gains(made, measured, distances, bench),
        reference=name,
        truth=target.truth,
        distance=suite.distance,
        frechet_reference=target.name,
        frechet_features=bench.features.name,
        frechet_floor=target.floor,
        frechet_shuffled=target.shuffled,
        clip_score_model=None if bench.clip is None else bench.clip.name,
        suite=dict(asked),
        seeds={"suite": suite.seed, "first_clip": bench.cases.first_seed, "clips": len(bench.cases)},
        machine=asdict(describe_machine(bench.device)),
        versions=versions(),
        runtime=effective(rows[0].model),
        memory=costs[name].memory_kind,
        models=dict(models),
        previews=tuple(_previews(bench, measured)),
        notes=tuple(_notes(rows, bench, target)),
    )


def _previews(bench: Bench, measured: Mapping[str, Measured]) -> Iterator[dict[str, Any]]:
    """The checker's findings for each clip that the report shows."""
    cases = bench.cases
    for prompt in range(min(bench.suite.previews, len(cases.prompts))):
        clip = prompt * cases.seeds_per_prompt
        marks = {name: _marks(m, clip) for name, m in measured.items()} if cases.scenes is not None else None
        yield {"prompt": cases.prompts[prompt], "seed": cases.seeds(prompt)[0], "marks": marks}


def _marks(mine: Measured, clip: int) -> dict[str, str]:
    if mine.right is None or mine.abstained is None:
        return {}
    pairs = zip(ATTRIBUTES, mine.right[clip].tolist(), mine.abstained[clip].tolist(), strict=True)
    return {name: "right" if right else "unclear" if unclear else "wrong" for name, right, unclear in pairs}


def _notes(rows: Sequence[Entry], bench: Bench, target: Target) -> Iterator[str]:
    """Notes that a reader needs before quoting a figure."""
    (clips, width), distance = target.features.shape, bench.suite.distance
    if bench.cases.scenes is None and bench.clip is None and bench.num_frames > 1:
        yield "Accuracy: not measured, because only prompts of the built-in world can be checked."
    if bench.num_frames == 1:
        yield "Accuracy, motion and flicker: not measured, because these models make pictures."
    if target.halves:
        yield f"{distance} floor: compares two halves of the reference set, so it is higher than the floor of the full set."
    if (prompts := len(bench.cases.prompts)) < FEWEST:
        yield "Intervals: none, because one prompt says nothing about other prompts."
    elif prompts < ENOUGH:
        yield (f"Intervals: wide and not reliable, because {prompts} prompts are few; use {ENOUGH} or more.")
    if clips < 2 * width:
        yield (
            f"{distance}: {clips} clips are few for {width} features, so the values are biased upwards. Compare only at equal "
            "n and features, and trust only differences much larger than the floor."
        )
    trained = {entry.model.card.num_frames for entry in rows} - {bench.num_frames}
    if trained:
        yield f"Clips have {bench.num_frames} frames; the models were trained for {', '.join(map(str, sorted(trained)))}."
    if target.shuffled < 2 * target.floor and bench.num_frames > 1:
        yield f"{distance}: do not rely on it. Shuffled frames hardly change it, so these features do not see time."
    if bench.clip is not None and bench.clip.cut:
        yield f"CLIPScore: {bench.clip.cut} of {len(bench.cases.prompts)} prompts are too long for CLIP and were cut."
    if isinstance(bench.truth, Drawn) and bench.truth.skipped:
        yield f"Real clips left out because they are missing, damaged or too short: {bench.truth.skipped}."
    if not bench.paired:
        yield "Noise: the models' latents have different shapes, so one seed gives each model different noise."
    if bench.cases.seeds_per_prompt == 1:
        yield "Diversity: not measured, because there is one seed per prompt."
    if bench.runtime.dtype != "float32":
        yield f"All rows ran in {effective(rows[0].model)['arithmetic']}."
