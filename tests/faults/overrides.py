"""Faults in what is given on the command line over a recipe's own values."""

from __future__ import annotations

from faults.case import Case
from faults.given import recipe

CASES = (
    Case(
        "a key that is not there", ("explain", "r.yaml", "--settings.stepz", "3"), ("settings.stepz", "steps"), recipe()
    ),
)
