"""Judge finished videos of any tool: folders of files, matched, measured and compared with the first."""

from fewstep.evaluate.finished.answers import Preference, preferences, read_answers
from fewstep.evaluate.finished.judge import Comparison, Options, compare_videos
from fewstep.evaluate.finished.study import Study, StudyOptions, load_study, make_study

__all__ = [
    "Comparison", "Options", "Preference", "Study", "StudyOptions", "compare_videos", "load_study", "make_study",
    "preferences", "read_answers",
]  # fmt: skip
