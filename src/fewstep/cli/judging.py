"""`fewstep compare` and `fewstep study`: judge finished videos by figures and by people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.cli.commands import _made
from fewstep.cli.pace import telling
from fewstep.cli.screen import screen
from fewstep.evaluate.finished.judge import Options, compare_videos
from fewstep.evaluate.page.finished import write_page

if TYPE_CHECKING:
    from fewstep.cli.finished import Compare


def compare(options: Compare) -> int:
    chosen = Options(
        prompt_file=options.prompt_file, features=options.features or "", clip=str(options.clip or ""),
        num_frames=options.num_frames, allow_missing=options.allow_missing,
    )  # fmt: skip
    with telling(options.quiet) as progress:
        found = compare_videos(options.sides, options.output, chosen, progress)
    page = write_page(found, options.output)
    out = screen()
    for line in (*found.verdict, *found.notes):
        out.print(line, markup=False, soft_wrap=True)
    return _made(page)
