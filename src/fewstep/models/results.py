"""The folder of a run's result, named after what the run trained."""

from __future__ import annotations

from pathlib import Path

RESULTS = ("student", "teacher", "codec", "text", "features")
"""Names of results: the role of a trained denoiser, or the part of the model that was trained."""


def result_in(run: Path) -> Path | None:
    """The folder of the result in a finished run; None if there is none. Runs of version 0.1.0 always call it `student`."""
    return next((run / name for name in RESULTS if (run / name / "card.json").is_file()), None)
