"""Is it working? Figures on fixed prompts and seeds, one word with its reason, and what follows from it."""

from fewstep.engine.health.monitor import Monitor, watching
from fewstep.engine.health.record import Check, Record, read_record
from fewstep.engine.health.verdict import judge
from fewstep.engine.health.vitals import Baselines, Looks, Verdict, Vitals, figures

__all__ = [
    "Baselines", "Check", "Looks", "Monitor", "Record", "Verdict", "Vitals", "figures", "judge", "read_record", "watching",
]  # fmt: skip
