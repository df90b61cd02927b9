"""`fewstep compare` and `fewstep study`: judge finished videos by figures and by people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.cli.command import UsageError
from fewstep.cli.commands import _made
from fewstep.cli.pace import telling
from fewstep.cli.screen import screen
from fewstep.evaluate.finished.answers import preferences, read_answers, told
from fewstep.evaluate.finished.judge import Options, compare_videos
from fewstep.evaluate.finished.study import StudyOptions, load_study, make_study
from fewstep.evaluate.page.finished import write_page
from fewstep.evaluate.page.study import write_study_page

if TYPE_CHECKING:
    from fewstep.cli.finished import Compare, Study


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


def study(options: Study) -> int:
    if options.answers:
        return _answered(options)
    if options.output is None:
        raise UsageError("give --output to make a study, or --answers and the folder of a study to compute its result")
    chosen = StudyOptions(
        questions=options.question, prompt_file=options.prompt_file, pairs=options.pairs, seed=options.seed
    )
    with telling(options.quiet) as progress:
        made = make_study(options.sides, options.output, chosen, progress)
    page = write_study_page(made, options.output)
    print(
        f"{len(made.pairs)} pairs. Give raters the folder {page.parent}, without key.json, which says which video is whose."
    )
    return _made(page)


def _answered(options: Study) -> int:
    if len(options.sides) != 1 or options.output is not None:
        raise UsageError("--answers needs one folder, the output of fewstep study, and no --output")
    plain = type(options)(sides=options.sides)
    for name in ("question", "prompt_file", "pairs", "seed"):
        if getattr(options, name) != getattr(plain, name):
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to the making of a study; leave it out with --answers"
            )
    asked = load_study(options.sides[0])
    found = preferences(read_answers(options.answers, asked), asked)
    for line in told(found, asked):
        screen().print(line, markup=False, soft_wrap=True)
    return 0
