"""A preparation that several processes share. Every clip that is encoded is noted beside the output.

In the first attempt process `rank` kills itself when it is about to encode its clip `number`.
"""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path

from torch import Tensor

from fewstep.core.env import place
from fewstep.core.peers import meet_peers, part_company
from fewstep.data import Cut, Preparation, prepare, store_texts
from fewstep.data.store import ShardReader
from support_data import tiny

PLAN = Preparation(cut=Cut(num_frames=4, height=16, width=16, clips_per_video=0), shard_size=2, part_size=2)


def run(videos: Path, output: Path, rank: int = -1, number: int = 0) -> None:
    model, here = tiny(), place()
    encode, notes = model.codec.encode, output.with_name(f"{output.name}.encoded.{here.rank}")
    clips = count(1)

    def noted(frames: Tensor, **options: bool) -> Tensor:
        with notes.open("a") as file:
            file.writelines(f"{float(clip.mean()):.3f}\n" for clip in frames)
        if (here.rank, here.attempt) == (rank, 0) and number in [next(clips) for _ in frames]:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(frames, **options)

    model.codec.encode = noted  # type: ignore[method-assign]
    made = prepare(videos, output, model.codec, PLAN)
    store_texts(model, ShardReader(made.folder, "latents").captions, output / "texts", peers=meet_peers())
    part_company()
