"""One table for all methods: same teacher, prompts, seeds and budget, best checkpoint by one rule."""

from fewstep.leaderboard.budget import DEMO, lengthened, work
from fewstep.leaderboard.contest import Contestant, contestants
from fewstep.leaderboard.page import write_page
from fewstep.leaderboard.regressions import fallen
from fewstep.leaderboard.results import TEACHER, Figures, Result, load_result, load_results, summary
from fewstep.leaderboard.runs import Run, measure_teacher, run, teacher_measured
from fewstep.leaderboard.switches import JOINED
from fewstep.leaderboard.table import write_table

__all__ = [
    "DEMO",
    "JOINED",
    "TEACHER",
    "Contestant",
    "Figures",
    "Result",
    "Run",
    "contestants",
    "fallen",
    "lengthened",
    "load_result",
    "load_results",
    "measure_teacher",
    "run",
    "summary",
    "teacher_measured",
    "work",
    "write_page",
    "write_table",
]
