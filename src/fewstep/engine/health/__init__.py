"""Health checks of a run: figures on fixed prompts and seeds, a one-word verdict with its reason, and actions."""

from fewstep.engine.health.monitor import Monitor, watching
from fewstep.engine.health.record import Check, Record, read_record
from fewstep.engine.health.verdict import judge
from fewstep.engine.health.vitals import Baselines, Looks, Verdict, Vitals, figures

__all__ = [
    "Baselines", "Check", "Looks", "Monitor", "Record", "Verdict", "Vitals", "figures", "judge", "read_record", "watching",
]  # fmt: skip
