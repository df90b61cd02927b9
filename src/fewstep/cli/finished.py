"""Commands that judge finished videos, whoever made them, with their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fewstep.cli.command import Command, Overrides


@dataclass(frozen=True)
class Compare(Command):
    """Compare finished videos of any tool with the first folder's, and write figures, a verdict and a page with players."""

    sides: Positional[Annotated[tuple[Path, ...], arg(metavar="VIDEOS")]]
    """Two or more folders of videos or pictures, or two or more files. The first is the reference."""
    output: Path
    """Folder to write results.json, compare.html and copies for its players to."""
    prompt_file: Path | None = None
    """Prompts. A text file with one prompt per line matches files by order; a .csv or .jsonl file with the columns video and
    caption matches them by name (default: match by name, without prompts)."""
    features: str | None = None
    """Features for the Frechet distance, as for fewstep evaluate: a TorchScript file (it runs code: use only one that you
    trust), a folder, or `pooled` (default: no distance)."""
    clip: Path | None = None
    """Folder with CLIPModel and CLIPProcessor, for CLIPScore and consistency (default: neither)."""
    num_frames: int | None = None
    """Compare at most this many frames, from the beginning (default: all)."""
    allow_missing: bool = False
    """Leave out videos that are not in all folders, and say so (default: refuse)."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import judging

        return judging.compare(self)


@dataclass(frozen=True)
class Study(Command):
    """Make a blind side-by-side page for a user study, or compute the preference from its answers.

    Two folders and --output make a study. Give raters the folder OUTPUT/page, and nothing else. One study folder and --answers
    compute the share of answers for the second folder, with an interval over videos and raters."""

    sides: Positional[Annotated[tuple[Path, ...], arg(metavar="VIDEOS")]]
    """Two folders of videos or pictures, or two files; with --answers, the folder of a study."""
    output: Path | None = None
    """Folder to write the page and key.json to."""
    answers: tuple[Path, ...] = ()
    """CSV files that raters saved."""
    question: tuple[str, ...] = ("Which video do you prefer?",)
    """Questions, asked about each pair."""
    prompt_file: Path | None = None
    """Prompts, which are shown above the videos, and match the files as for fewstep compare (default: match by name)."""
    pairs: int | None = None
    """Number of pairs, drawn by the seed (default: all)."""
    seed: int = 0
    """Seed that draws pairs, their order, and which copy is whose."""
    quiet: bool = False
    """Hide the progress bar."""

    def run(self, overrides: Overrides) -> int:
        from fewstep.cli import judging

        return judging.study(self)
