"""Results of an evaluation as plain data, stored as `results.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewstep.core.atomic import write_text
from fewstep.diffusion.times import in_steps

FILE = "results.json"
CLIPS = "previews.safetensors"
"""The clips shown in the report, uint8 `[K, 3, F, H, W]` under each row's name."""

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Figures of a student minus those of its teacher at the same number of steps, on the same prompts and seeds."""

    baseline: str
    accuracy: float | None
    """Difference between the shares of clips with every attribute right."""
    accuracy_ci: Range | None
    """95 % interval over prompts (`metrics.statistics.difference_of_shares`); like all intervals, None with a single
    prompt."""
    frechet: float | None
    """Difference between the Frechet distances; negative is better."""
    frechet_ci: Range | None = None
    """95 % interval, jackknife over prompts."""
    clip_score: float | None = None
    """Difference between the CLIPScores."""
    clip_score_ci: Range | None = None
    """95 % interval: Student's t of the differences by prompt."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one number of steps. None means that the figure could not be measured."""

    name: str
    model: str
    role: str
    steps: int
    nfe: int
    """Network evaluations per clip; a call with guidance counts as two."""
    accuracy: float | None
    """Share of clips with every attribute of the prompt right; an abstention counts as wrong."""
    accuracy_ci: Range | None
    """95 % interval: Wilson's, for the effective number of independent clips (`metrics.statistics.clustered_wilson`)."""
    attributes: dict[str, float] | None
    """Share of clips with this attribute right, per attribute."""
    attributes_ci: dict[str, Range] | None = None
    """95 % intervals of `attributes`, computed like `accuracy_ci`."""
    abstained: float | None
    """Share of clips with at least one attribute too unclear to read."""
    clip_score: float | None = None
    """CLIPScore: 100 cos(image, text), mean over frames, then over clips."""
    clip_score_ci: Range | None = None
    """95 % interval: Student's t over prompts."""
    gain: Gain | None
    frechet: float | None
    """Frechet distance to the reference; None in the reference row itself."""
    frechet_ci: Range | None = None
    """95 % interval: jackknife over prompts. It covers the variance at this n, not the bias."""
    frechet_infinity: float | None = None
    """Frechet distance extrapolated to infinitely many clips; None with fewer than two clips per feature."""
    frechet_n: int
    """Clips on each side of the distance. Compare distances only at equal n."""
    frechet_shuffled: float
    """Control: distance of the same clips with their frames in random order. It must be higher."""
    motion: float | None
    """Motion relative to the reference row (1 = equal); diversity and flicker likewise. None if the reference has none, and
    for pictures."""
    motion_ci: Range | None
    motion_absolute: float | None
    diversity: float | None
    diversity_absolute: float | None
    """Diversity, not relative to any row; None with a single seed per prompt."""
    flicker: float | None
    flicker_absolute: float | None
    seconds: float
    """Median seconds for one clip alone, from text to latents."""
    seconds_p95: float
    seconds_runs: int
    seconds_decode: float
    """Median seconds from latents to frames; not part of `seconds`."""
    seconds_batched: float
    """Seconds per clip at the suite's batch size, from text to latents."""
    flops: int | None
    """Floating-point operations per clip, from text to latents."""
    memory_mb: float


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The same figures for true clips (rendered or real): what a perfect model would score."""

    name: str = "renderer"
    """Name of the row: `renderer` or `real clips`."""
    accuracy: float | None
    clip_score: float | None = None
    frechet: float | None
    """Distance between two independent sets of the same size: the noise floor of the distance. None with a single set."""
    motion: float | None
    diversity: float | None
    flicker: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows, and everything that is needed to repeat or to question them."""

    rows: tuple[Row, ...]
    reference: str
    """Name of the row that motion, diversity and flicker are relative to."""
    truth: Truth | None
    """Row of the true clips; None if clips can neither be rendered nor compared with real ones."""
    distance: str = "Frechet"
    """Name of the distance: `FVD` if it is measured to real clips."""
    frechet_reference: str
    frechet_features: str
    frechet_floor: float
    frechet_shuffled: float
    """Control: distance of the reference clips with shuffled frames. If it is close to the floor, the features cannot see
    time."""
    clip_score_model: str | None = None
    """CLIP model used for CLIPScore."""
    suite: dict[str, Any]
    seeds: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    runtime: dict[str, str] = field(default_factory=dict)
    """How the models ran, as it took effect (`models.runtime.effective`)."""
    memory: str
    """Meaning of `memory_mb` on this machine."""
    models: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each row's denoiser."""
    previews: tuple[dict[str, Any], ...] = ()
    """Prompt, seed and, for each row, every attribute as right, wrong or unclear."""
    notes: tuple[str, ...] = ()
    """Notes that a reader needs before quoting a figure."""

    @property
    def checked(self) -> bool:
        """Whether the built-in world's checker could judge these prompts."""
        return any(row.accuracy is not None for row in self.rows)

    @property
    def aligned(self) -> bool:
        """Whether CLIPScore was measured."""
        return self.clip_score_model is not None

    def row(self, name: str) -> Row:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ValueError(f"there is no row {name!r}; choose from {', '.join(row.name for row in self.rows)}")
        return found[0]

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")
        return path


def figures(report: Report, weights: str) -> dict[str, float]:
    """Figures of the denoiser with the fingerprint `weights`. Each name says what was measured and on how many clips.

    ValueError if that denoiser was not measured.
    """
    rows = [row for row in report.rows if report.models.get(row.name) == weights]
    if not rows:
        raise ValueError(
            f"this evaluation measured other weights ({', '.join(sorted(set(report.models.values())))}), not these "
            f"({weights}); run fewstep evaluate on this student"
        )
    found: dict[str, float] = {}
    for row in rows:
        of = {
            "all attributes right": (row.accuracy, report.seeds["clips"]),
            f"CLIPScore by {report.clip_score_model}": (row.clip_score, report.seeds["clips"]),
            f"{report.distance} to {report.frechet_reference} by {report.frechet_features}": (
                row.frechet,
                row.frechet_n,
            ),
            f"motion relative to {report.reference}": (row.motion, report.seeds["clips"]),
            f"diversity relative to {report.reference}": (row.diversity, report.seeds["clips"]),
        }
        steps = in_steps(row.steps)
        found |= {f"{name}, {steps} (n = {n})": value for name, (value, n) in of.items() if value is not None}
    return found


def load_report(folder: Path | str) -> Report:
    """Read the `results.json` in a folder written by `evaluate`."""
    tree = json.loads((Path(folder) / FILE).read_text())
    rows = tuple(_row(row) for row in tree.pop("rows"))
    truth = tree.pop("truth")
    return Report(rows=rows, truth=Truth(**truth) if truth else None, **_tuples(tree))


def _row(tree: dict[str, Any]) -> Row:
    ranges = tree.get("attributes_ci")
    return Row(**{**_tuples(tree), "gain": _gain(tree["gain"]), "attributes_ci": _tuples(ranges) if ranges else None})


def _gain(tree: dict[str, Any] | None) -> Gain | None:
    return Gain(**_tuples(tree)) if tree else None


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
