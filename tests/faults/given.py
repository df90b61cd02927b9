"""What cases start from: a recipe that trains in a second, and folders of models that are made once and copied."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

RECIPE = """
model:
  type: Scratch
  denoiser: {type: VideoDiT, width: 24, depth: 1, heads: 2, text_width: 16}
  text: {type: TextEncoder, width: 16, depth: 1, heads: 2, buckets: 64}
  codec: {type: FrameAutoencoder, width: 8, depth: 1}
  num_frames: 4
method: {type: FlowMatching}
data: {type: WorldClips, num_frames: 4}
settings: {steps: 1, batch: 2, save_every: 1}
"""
"""Valid, as it stands."""


def recipe(old: str = "", new: str = "", text: str = RECIPE) -> dict[str, str]:
    """`files` of a case: `r.yaml`, with one piece of its text replaced."""
    assert old in text, f"{old!r} is not in the recipe"
    return {"r.yaml": text.replace(old, new, 1) if old else text}


@cache
def _made(kind: str) -> Path:
    """A folder of `kind`, made once per process: `teacher` (a model), `run` (of one iteration, with its student)."""
    from fewstep.core.build import build, load_yaml
    from fewstep.recipe import Recipe
    from fewstep.written import names

    made = build(Recipe, load_yaml(RECIPE), names())
    folder = Path(tempfile.mkdtemp(prefix="fewstep-faults-")) / kind
    if kind == "teacher":
        made.model.load().save(folder)
    else:
        made.run(folder, quiet=True)
    return folder


def teacher(here: Path) -> Path:
    """The folder `teacher`: a model of a few thousand weights, with its card."""
    return Path(shutil.copytree(_made("teacher"), here / "teacher"))


def run(here: Path) -> Path:
    """The folder `run`: a finished run of `r.yaml` with a checkpoint, and `run/teacher`."""
    (here / "r.yaml").write_text(RECIPE)
    return Path(shutil.copytree(_made("run"), here / "run"))


def card(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    """A `prepare`: the folder `teacher`, whose card was changed in place."""

    def prepare(here: Path) -> Path:
        path = teacher(here) / "card.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))
        return path

    return prepare


def damaged(
    file: str, change: Callable[[bytes], bytes], made: Callable[[Path], object] = teacher
) -> Callable[[Path], Path]:
    """A `prepare`: what `made` makes, with the bytes of one file (the first that matches the pattern) changed."""

    def prepare(here: Path) -> Path:
        made(here)
        path = sorted(here.glob(file))[0]
        path.write_bytes(change(path.read_bytes()))
        return path

    return prepare
