"""Judge finished videos of any tool: folders of files, matched, measured and compared with the first."""

from fewstep.evaluate.finished.judge import Comparison, compare_videos
from fewstep.evaluate.finished.matching import Matched, match

__all__ = ["Comparison", "Matched", "compare_videos", "match"]
