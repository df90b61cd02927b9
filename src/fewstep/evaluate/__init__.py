"""Evaluation: measure models on the same prompts and seeds, with controls, intervals, costs and an HTML report."""

from fewstep.core.flops import count_flops
from fewstep.evaluate.latency import Latency, measure_latency, peak_memory
from fewstep.evaluate.machine import Machine, describe_machine, versions
from fewstep.evaluate.page.report import write_report
from fewstep.evaluate.page.table import details, table
from fewstep.evaluate.real import RealClips
from fewstep.evaluate.results import Gain, Report, Row, Truth, load_report
from fewstep.evaluate.run import evaluate
from fewstep.evaluate.suite import Entry, Suite, entries

__all__ = [
    "Entry", "Gain", "Latency", "Machine", "RealClips", "Report", "Row", "Suite", "Truth", "count_flops",
    "describe_machine", "details", "entries", "evaluate", "load_report", "measure_latency", "peak_memory", "table",
    "versions", "write_report",
]  # fmt: skip
