"""How fast an index opens and is drawn from, and how fast videos are prepared; each prints one line of JSON.

`python bench/data.py 100000`: an index of so many clips, made for it: real shards of tiny latents, and captions as
long as a dataset's. `python bench/data.py VIDEOS`: a folder of captioned videos, prepared with a codec that takes
as long per clip as decoding one does, and no core, as one on an accelerator; once one after the other, then ahead.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core import Rng
from fewstep.data import Cut, Keep, Latents, Preparation, prepare, read_listing, read_prompts
from fewstep.data.clips import clips_of
from fewstep.models import FrameAutoencoder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support_data import synthetic_index, tiny
from support_memory import process

BATCH = 64


def timed(action: Callable[[], object]) -> tuple[float, object]:
    begun = time.perf_counter()
    value = action()
    return time.perf_counter() - begun, value


def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder, model, needs = synthetic_index(Path(name) / "latents", count), tiny(), frozenset({"x0"})
        warm = synthetic_index(Path(name) / "warm", BATCH)
        del model.parts["text"]  # encoding prompts is not what is measured
        prompts = Path(name) / "prompts.txt"
        prompts.write_text("\n".join(f"prompt {i} about a red ball that rolls down the stairs" for i in range(count)))
        Latents(path=str(warm)).open(model, needs).batch(1, Rng(0))  # what is imported once
        before = process("VmRSS")
        opening, source = timed(lambda: Latents(path=str(folder)).open(model, needs))
        held = process("VmRSS") - before
        step = count // BATCH + 1
        first, _ = timed(lambda: source.batch(BATCH, Rng(0)))  # type: ignore[attr-defined]
        again, _ = timed(lambda: source.batch(BATCH, Rng(0, step=1)))  # type: ignore[attr-defined]
        resumed, _ = timed(lambda: source.batch(BATCH, Rng(0, step=1000 * step)))  # type: ignore[attr-defined]
        text, _ = timed(lambda: read_prompts(prompts))
        return {
            "clips": count, "index MB": (folder / "index.jsonl").stat().st_size / 1e6, "open s": opening,
            "held MB": held / 1e6, "first batch s": first, "second batch s": again,
            "batch of epoch 1000 s": resumed, "open prompts s": text,
        }  # fmt: skip


class Device(FrameAutoencoder):
    """A codec that is busy for `seconds` per clip and leaves the cores alone."""

    def __init__(self, seconds: float) -> None:
        super().__init__(width=8, depth=1)
        self.seconds, self.busy = seconds, 0.0

    def encode(self, frames: Tensor, *, autocast: bool = False) -> Tensor:
        time.sleep(self.seconds * len(frames))
        self.busy += self.seconds * len(frames)
        return torch.zeros(len(frames), *self.latent_shape(*frames.shape[2:]))


def measure_preparing(folder: str, repeat: int = 4) -> dict[str, float]:
    """Prepare every video `repeat` times; `busy` is the share of the time in which the codec works."""
    cut = Cut(num_frames=16, height=64, width=112, clips_per_video=0)
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "captions.jsonl"
        rows = [{"video": str(item.path.resolve()), "caption": item.caption} for item in read_listing(folder)]
        table.write_text("\n".join(json.dumps(row) for row in rows * repeat))
        items = read_listing(table)
        decoding, clips = timed(lambda: sum(1 for item in items for _ in clips_of(item, cut, Keep())))
        assert isinstance(clips, int)
        device = Device(decoding / clips)

        def one_after_the_other() -> None:
            for item in items:
                for clip in clips_of(item, cut, Keep()):
                    device.encode(clip.frames.movedim(-1, 0)[None])

        takes, _ = timed(one_after_the_other)
        figures = {"clips": clips, "decode s per clip": decoding / clips, "before, clips per s": clips / takes}
        figures["before, busy"] = device.busy / takes
        device.busy = 0.0
        takes, _ = timed(lambda: prepare(table, Path(name) / "latents", device, Preparation(cut=cut)))
        return figures | {"ahead, clips per s": clips / takes, "ahead, busy": device.busy / takes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    figures = measure(int(sys.argv[1])) if sys.argv[1].isdecimal() else measure_preparing(sys.argv[1])
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
