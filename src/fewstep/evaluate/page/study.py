"""The page of a blind study, which saves a rater's answers as a CSV file and needs no server."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.core.atomic import write_text
from fewstep.evaluate.finished.study import COPIES, RATERS, Study
from fewstep.evaluate.page.template import page

FILE = "study.html"


def write_study_page(study: Study, folder: Path | str) -> Path:
    """Write `page/study.html` below the output folder of `make_study`. It names copies and prompts, never the sides."""
    pairs = [dict(zip(COPIES, pair.files, strict=True)) | {"prompt": pair.prompt} for pair in study.pairs]
    tree = {"id": study.id, "questions": study.questions, "pairs": pairs}
    # In a script element, "</script>" in a prompt would end it.
    text = json.dumps(tree).replace("<", "\\u003c")
    path = Path(folder) / RATERS / FILE
    write_text(path, page("study.html", study=text))
    return path
