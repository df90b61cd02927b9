"""Report of the videos and clips that a preparation dropped: counts by reason, every case by name, and some pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fewstep.data.base import DataError
from fewstep.data.listing import Listing
from fewstep.data.store import writing
from fewstep.data.video import read_video

EXAMPLES = 6
"""Number of pictures per reason, each from a different video."""
TILE = (72, 128)


@dataclass(frozen=True)
class Dropped:
    """A video, or one of its clips, that was dropped."""

    item: int
    """The video's number in the listing."""
    name: str
    problem: str
    """Reason, then a colon and the details if any."""
    start: int | None = None
    """First frame of the clip; None: the whole video, or all of it after some point."""

    @property
    def reason(self) -> str:
        return self.problem.partition(":")[0].partition(" (after")[0]


@dataclass
class Count:
    """How often a reason occurred, and one example."""

    videos: int = 0
    clips: int = 0
    example: str = ""


@dataclass(frozen=True)
class Report:
    """Number of `videos` in the listing, number of `clips` made from them, and counts of `dropped` ones by reason."""

    videos: int
    clips: int
    dropped: Mapping[str, Count] = field(default_factory=dict)


def write_report(folder: Path, listing: Listing, parts: Iterable[Mapping[str, Any]]) -> Report:
    """Write `dropped.jsonl` (every case), `report.json` (counts) and `dropped.png` (examples) from the manifests of all parts.

    DataError if no clip is left.
    """
    counts: dict[str, Count] = {}
    shown: dict[str, list[Dropped]] = {}
    clips = 0
    with writing(folder / "dropped.jsonl") as draft, draft.open("w", encoding="utf-8") as lines:
        for part in parts:
            clips += part["rows"]
            for case in (Dropped(**row) for row in part["dropped"]):
                lines.write(json.dumps(vars(case), ensure_ascii=False) + "\n")
                count = counts.setdefault(case.reason, Count(example=f"{case.name}: {case.problem}"))
                count.videos += case.start is None
                count.clips += case.start is not None
                examples = shown.setdefault(case.reason, [])
                if len(examples) < EXAMPLES and case.item not in (example.item for example in examples):
                    examples.append(case)
    report = Report(len(listing), clips, dict(sorted(counts.items())))
    if not clips:
        raise DataError("no video gave a clip: " + "; ".join(count.example for count in report.dropped.values()))
    if shown:
        _draw(folder / "dropped.png", listing, dict(sorted(shown.items())))
    with writing(folder / "report.json") as draft:
        draft.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def read_report(folder: str | Path) -> Report:
    """Read the report in a prepared folder. DataError if it is damaged."""
    path = Path(folder) / "report.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Report(**{**tree, "dropped": {reason: Count(**count) for reason, count in tree["dropped"].items()}})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); delete {folder} and prepare it again") from None


def _draw(path: Path, listing: Listing, shown: Mapping[str, list[Dropped]]) -> None:
    """Draw first frames, one row per reason; grey if a frame cannot be read."""
    height, width = TILE
    sheet = Image.new("RGB", (EXAMPLES * width, len(shown) * (height + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (reason, cases) in enumerate(shown.items()):
        top = row * (height + 14)
        pen.text((2, top + 1), reason, fill="black")
        for column, case in enumerate(cases):
            frame = np.full((*TILE, 3), 160, np.uint8)
            with suppress(Exception):  # the report already names the problem of this video
                frame = read_video(listing[case.item].video(), 1, size=TILE, start=case.start or 0)[0].numpy()
            sheet.paste(Image.fromarray(frame), (column * width, top + 14))
    with writing(path) as draft:
        sheet.save(draft)
