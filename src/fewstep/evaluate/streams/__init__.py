"""Do streams drift? Long clips of streaming students, measured window by window; and switched prompts."""

from fewstep.evaluate.streams.clips import Fresh, LongClips, Rendered, Sampled, Streamed, clips_of
from fewstep.evaluate.streams.results import Claim, DriftReport, LongRow, load_drift
from fewstep.evaluate.streams.run import measure_drift, rows_of
from fewstep.evaluate.streams.suite import DriftSuite
from fewstep.evaluate.streams.switching import Switch

__all__ = [
    "Claim", "DriftReport", "DriftSuite", "Fresh", "LongClips", "LongRow", "Rendered", "Sampled", "Streamed", "Switch",
    "clips_of", "load_drift", "measure_drift", "rows_of",
]  # fmt: skip
