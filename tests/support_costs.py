"""What every test costs: `pytest --save-durations FILE` writes it, `python tools/slowest.py FILE` prints the dearest."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path

import pytest


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for; other processes do not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _forked()


def _forked() -> float:
    """The same of the process that others are forked from (`support_processes`); 0 where the system does not say."""
    stat = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/stat")  # type: ignore[attr-defined]
    if not stat.is_file():
        return 0.0
    after_name = stat.read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")


class Costs:
    """CPU-seconds by test, set-up and clean-up included; a shared fixture counts for the test that needed it first."""

    def __init__(self, file: Path) -> None:
        self.file, self.before = file, cpu_seconds()
        self.found: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report, now = (yield), cpu_seconds()
        report.user_properties.append(("cpu", now - self.before))  # travels from a test process to the one that writes
        self.before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found[report.nodeid] += dict(report.user_properties)["cpu"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            rounded = {test: round(seconds, 3) for test, seconds in sorted(self.found.items())}
            self.file.write_text(json.dumps(rounded, indent=0), encoding="utf-8")
