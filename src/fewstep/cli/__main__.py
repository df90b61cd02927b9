"""`python -m fewstep.cli`."""

from fewstep.cli import run

run()
