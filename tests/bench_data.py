"""How fast an index opens and is drawn from, and how fast videos are prepared; each prints one line of JSON.

`python tests/bench_data.py 100000`: an index of so many clips, made for it: real shards of tiny latents, and captions as
long as a dataset's. `python tests/bench_data.py VIDEOS`: a folder of captioned videos, prepared with a codec that takes
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
from fewstep.core.peers import Peers
from fewstep.data import Cut, Keep, Latents, Preparation, prepare, read_listing, read_prompts
from fewstep.data.clips import clips_of
from fewstep.data.store import PartedWriter
from fewstep.models import Card, FrameAutoencoder, TextEncoder, VideoModel, fingerprint
from support_memory import process

PART, SHARD, BATCH = 16_384, 4096, 64
"""Few files: making them is not what is measured."""


def tiny() -> VideoModel:
    torch.manual_seed(0)
    parts = {"codec": FrameAutoencoder(width=8, depth=1), "text": TextEncoder(width=16, length=8, buckets=64, depth=1)}
    return VideoModel(Card(name="tiny", num_frames=1, height=4, width=4), parts)


def synthetic_index(folder: Path, count: int) -> Path:
    """A prepared folder of `count` clips of one pixel, whose latents are their numbers."""
    cut = {"num_frames": 1, "height": 4, "width": 4}
    settings = {"codec": fingerprint(tiny().codec), "cut": cut}
    writer = PartedWriter(folder, "latents", settings, -(-count // PART), Peers())
    for number in writer.mine:
        part = writer.part(number, SHARD)
        for i in range(number * PART, min(count, (number + 1) * PART)):
            caption = (
                f"clip {i} of a man in a blue coat who walks along a rainy street at night while cars pass by " * 3
            )
            row = {"caption": caption, "video": f"part{number}/video{i:08d}.mp4", "start": 0}
            part.add(row, {"latents": torch.full((4, 1, 1, 1), float(i))}, {})
        part.finish({})
    writer.finish(latent_shape=[4, 1, 1, 1])
    return folder


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
    """Of every video `repeat` times over; `busy` is the share of the time in which the codec works."""
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
