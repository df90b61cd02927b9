"""Training data: prompts, video files, prepared latents, stored trajectories."""

from fewstep.data.base import Data, DataError, Source, draw_indices, require
from fewstep.data.files import Videos
from fewstep.data.listing import Item, Listing, read_listing
from fewstep.data.pairs import PairPlan, PairsCost, PairsMade, StoredPairs, make_pairs, pairs_cost
from fewstep.data.prepare import Prepared, prepare
from fewstep.data.prompts import Prompts, read_prompts
from fewstep.data.shards import Latents
from fewstep.data.store import Progress
from fewstep.data.texts import Texts
from fewstep.data.video import Clip, ClipError, Cut, read_clips, read_video, to_floats, to_pixels, write_video

DATA = (Latents, Prompts, StoredPairs, Videos)

__all__ = [
    "DATA", "Clip", "ClipError", "Cut", "Data", "DataError", "Item", "Latents", "Listing", "PairPlan", "PairsCost",
    "PairsMade", "Prepared", "Progress", "Prompts", "Source", "StoredPairs", "Texts", "Videos", "draw_indices",
    "make_pairs", "pairs_cost", "prepare", "read_clips", "read_listing", "read_prompts", "read_video", "require",
    "to_floats", "to_pixels", "write_video",
]  # fmt: skip
