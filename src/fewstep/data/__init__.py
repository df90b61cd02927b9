"""Training data: prompts, video files, prepared latents, stored trajectories."""

from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.clipped import Clipped, prepared_clips
from fewstep.data.degradation import Degradation
from fewstep.data.files import Videos
from fewstep.data.keep import Keep
from fewstep.data.layouts import LAYOUTS, Item
from fewstep.data.listing import Listing, read_listing
from fewstep.data.order import draw_indices
from fewstep.data.pairs import PairPlan, PairsCost, PairsMade, StoredPairs, make_pairs, pairs_cost
from fewstep.data.parts import PARTITIONS, ByCentroid, Part, Partition, centroids, partition_of
from fewstep.data.prepare import Preparation, Prepared, prepare
from fewstep.data.prompts import Prompts, read_prompts
from fewstep.data.report import Count, Report
from fewstep.data.shards import Latents
from fewstep.data.store import Progress
from fewstep.data.texts import Texts, store_texts
from fewstep.data.video import Clip, ClipError, Cut, read_clips, read_video, to_floats, to_pixels, write_video

DATA = (Latents, Prompts, StoredPairs, Videos)

__all__ = [
    "DATA", "LAYOUTS", "PARTITIONS", "ByCentroid", "Clip", "ClipError", "Clipped", "Count", "Cut", "Data", "DataError",
    "Degradation", "Item", "Keep", "Latents", "Listing", "PairPlan", "PairsCost", "PairsMade", "Part", "Partition",
    "Preparation", "Prepared", "Progress", "Prompts", "Report", "Source", "StoredPairs", "Texts", "Videos", "centroids",
    "draw_indices", "make_pairs", "pairs_cost", "partition_of", "prepare", "prepared_clips", "read_clips", "read_listing",
    "read_prompts", "read_video", "require", "store_texts", "to_floats", "to_pixels", "write_video",
]  # fmt: skip
