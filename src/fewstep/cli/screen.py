"""Text output: standard output, without colours and line breaks if it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def screen() -> Console:
    """A console on the current standard output. Lines are cut to the width of a terminal, and not cut elsewhere."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table without frames. Text is printed as it is: square brackets mean nothing."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
