"""`python -m fewstep`."""

from fewstep.cli import run

run()
