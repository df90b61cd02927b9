"""Encode video files to latent shards once, so that training does not decode and encode them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fewstep.core.lock import holding
from fewstep.core.peers import meet_peers
from fewstep.core.stopping import saying
from fewstep.data.base import DataError
from fewstep.data.clips import ahead, clips_of, depth_of
from fewstep.data.images import encode_ends
from fewstep.data.keep import Keep
from fewstep.data.layouts import Item, LayoutName
from fewstep.data.lines import Captions, Lines
from fewstep.data.listing import LISTING, Listing, root_of, write_listing
from fewstep.data.report import Dropped, Report, read_report, write_report
from fewstep.data.store import (
    GOES_ON,
    PartedWriter,
    Progress,
    ShardReader,
    ShardWriter,
    Storage,
    part_name,
    read_manifest,
    writing,
)  # fmt: skip
from fewstep.data.video import Clip, ClipError, Cut, to_floats
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.fingerprint import fingerprint
from fewstep.models.images import ImageEncoder

PROMPTS = "prompts.txt"
"""File with the captions of a prepared folder, one per line."""
PIXELS, MOST_CLIPS = 2**24, 16
"""Default limits for what is encoded at once: pixels of all frames, and clips. About 2 GiB for the built-in codec."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How videos become latents."""

    cut: Cut = Cut()
    keep: Keep = Keep()
    storage: Storage = "float16"
    autocast: Literal["off", "bf16"] = "off"
    """Precision of the codec: off is float32."""
    batch: int | None = None
    """Clips encoded at once. None: as many as have `PIXELS` pixels together, and at most `MOST_CLIPS`. The number may change
    only the last bits of latents."""
    threads: int = 4
    """Decoding threads per process."""
    shard_size: int = 64
    """Clips per file."""
    part_size: int = 64
    """Number of videos that a process takes at a time."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "part_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Prepared:
    """Result of a preparation, in `folder`."""

    folder: Path
    clips: int
    shards: int
    report: Report


def prepare(
    source: str | Path,
    output: str | Path,
    codec: FrameAutoencoder,
    plan: Preparation,
    *,
    layout: LayoutName = "plain",
    root: str | Path = "",
    progress: Callable[[Progress], None] = lambda event: None,
    image: ImageEncoder | None = None,
) -> Prepared:
    """Decode, cut and encode the captioned videos of `source` (see `read_listing`) into shards in `output`.

    Under torchrun every process calls it and takes its share; the result does not depend on the number of processes. After a
    kill, the same call continues, also with another number of processes, and gives the same bytes. A finished folder is not
    changed. Dropped videos and clips are reported with the reason (`Report`). `progress` is called once per video of this
    process' share. With `image`, the image encoder of an image-to-video model, the conditions from each clip's first frame (and
    last, if needed) are stored too. DataError if the folder was begun with other settings, videos or networks, if a shard is
    damaged, or if no video gave a clip; NonFiniteError if a latent does not fit `plan.storage`.
    """
    output, peers = Path(output), meet_peers()
    encoder = _Encoder(codec, image, plan)
    encoder.check()
    latent_shape = codec.latent_shape(plan.cut.num_frames, plan.cut.height, plan.cut.width)
    with holding(output) if peers.leads else nullcontext(), saying(lambda: GOES_ON):
        with peers.in_turn():
            if peers.leads:
                _list(source, output, layout, root)
            listing = Listing(output / LISTING, root_of(source, root))
        writer = PartedWriter(output, "latents", _settings(encoder, output), -(-len(listing) // plan.part_size), peers)
        if not writer.complete:
            _Share(writer, listing, encoder, plan, progress).run()
            peers.barrier()
            if peers.leads:
                write_report(output, listing, writer.manifests())
                _write_prompts(output / PROMPTS, writer)
                writer.finish(latent_shape=list(latent_shape))
            peers.barrier()
        else:
            ShardReader(output, "latents").check()
    done = read_manifest(output, "latents")
    return Prepared(output, done["rows"], done["shards"], read_report(output))


def _write_prompts(file: Path, writer: PartedWriter) -> None:
    """Write each distinct caption that has a clip, one per line, for `Prompts` and `--prompt-file`."""
    seen: set[int] = set()
    with writing(file) as draft, draft.open("w", encoding="utf-8") as lines:
        for number in range(writer.count):
            for caption in Captions(Lines(writer.folder / part_name(number) / "index.jsonl")):
                line = " ".join(caption.split())
                if hash(line) not in seen:
                    seen.add(hash(line))
                    lines.write(f"{line}\n")


def _settings(encoder: _Encoder, output: Path) -> dict[str, Any]:
    """Everything that decides what is stored."""
    plan = encoder.plan
    return {
        "codec": fingerprint(encoder.codec), "cut": asdict(plan.cut), "keep": asdict(plan.keep),
        "listing": _digest(output / LISTING), "storage": plan.storage, "autocast": plan.autocast,
        "part_size": plan.part_size, "shard_size": plan.shard_size,
    } | ({} if encoder.image is None else {"image": fingerprint(cast(nn.Module, encoder.image))})  # fmt: skip


def _list(source: str | Path, output: Path, layout: LayoutName, root: str | Path) -> None:
    """Write the list of videos. Refuse (DataError) a list that differs from the one with which this preparation began."""
    file, fresh = output / LISTING, output / f"new-{LISTING}"
    write_listing(fresh, source, layout, root)
    if (output / "manifest.json").is_file() and (not file.is_file() or _digest(fresh) != _digest(file)):
        fresh.unlink()
        raise DataError(
            f"{source} now lists other videos or captions than when {output} was begun (see {file}). "
            "Give another output folder, or delete this one."
        )
    if file.is_file() and _digest(fresh) == _digest(file):
        fresh.unlink()
    else:
        fresh.replace(file)


def _is_gone(folder: Path) -> bool:
    """Whether a folder has disappeared: a removed disk leaves nothing, or an empty mount point."""
    try:
        with os.scandir(folder) as found:  # finds the first file without listing all of them
            return next(found, None) is None
    except OSError:
        return True


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


@dataclass(frozen=True)
class _Share:
    """The share of this process: its parts that are not complete yet."""

    writer: PartedWriter
    listing: Listing
    encoder: _Encoder
    plan: Preparation
    progress: Callable[[Progress], None]

    def run(self) -> None:
        plan = self.plan
        window = plan.threads + self.encoder.batch
        total = sum(len(self._items(number)) for number in self.writer.mine)
        depth = depth_of(plan.cut, window)
        # Closed at once after an error, so that no thread goes on decoding.
        with closing(ahead(self._videos(), threads=plan.threads, window=window, depth=depth)) as videos:
            for (part, before, item), clips in videos:
                problem = part.video(item, clips)
                self.progress(Progress(before + part.item - part.items.start, total, item.name, problem))
                if part.item == part.items.stop:
                    part.finish()

    def _items(self, part: int) -> range:
        size = self.plan.part_size
        return range(part * size, min((part + 1) * size, len(self.listing)))

    def _videos(self) -> Iterator[tuple[tuple[_Part, int, Item], Callable[[], Iterator[Clip]]]]:
        """The remaining videos: the part, the number of videos of this share before that part, the video, and its decoder."""
        before = 0
        for number in self.writer.mine:
            items, shards = self._items(number), self.writer.part(number, self.plan.shard_size)
            if not shards.complete:
                part = _Part(shards, items, self.encoder, self.listing.root)
                for item in (self.listing[i] for i in items[part.item - items.start :]):
                    yield (part, before, item), partial(clips_of, item, self.plan.cut, self.plan.keep)
            before += len(items)


@dataclass(frozen=True)
class _Encoder:
    """Turns clips into the tensors that are stored."""

    codec: FrameAutoencoder
    image: ImageEncoder | None
    plan: Preparation

    @property
    def batch(self) -> int:
        """Number of clips encoded at once."""
        cut = self.plan.cut
        fits = max(1, min(MOST_CLIPS, PIXELS // (cut.num_frames * cut.height * cut.width)))
        return self.plan.batch or (1 if self.one_at_a_time else fits)

    @property
    def one_at_a_time(self) -> bool:
        return getattr(self.codec, "one_at_a_time", False)

    def check(self) -> None:
        if self.one_at_a_time and (self.plan.batch or 1) > 1:
            raise ValueError(
                f"{type(self.codec).__name__} encodes one clip at a time, so a batch of {self.plan.batch} would not be faster; "
                "leave batch out, and start more processes if the device is idle"
            )

    @torch.no_grad()
    def __call__(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        device = next(self.codec.parameters()).device
        frames = to_floats(torch.stack([clip.frames for clip in clips]).to(device))
        made = {"latents": self.codec.encode(frames, autocast=self.plan.autocast == "bf16")}
        if self.image is not None:
            made |= encode_ends(self.image, self.codec, frames)
        return {name: tensor.to("cpu", getattr(torch, self.plan.storage)) for name, tensor in made.items()}


class _Part:
    """One pass over the videos of a part, starting after the last complete shard."""

    def __init__(self, writer: ShardWriter, items: range, encoder: _Encoder, root: Path) -> None:
        self.writer, self.items, self.encoder, self.root = writer, items, encoder, root
        self.item: int = writer.resume.get("item", items.start)
        """The current video's number in the listing."""
        self.clips: int = writer.resume.get("clips", 0)
        """Number of clips of the current video that are done."""
        self.dropped: list[dict[str, Any]] = writer.resume.get("dropped", [])
        self.waiting: list[tuple[dict[str, Any], Clip, dict[str, Any]]] = []
        """Clips to be encoded together: each with its row in the index, and the position of this pass."""

    def video(self, item: Item, clips: Iterator[Clip]) -> str:
        """Take the clips of the current video. Returns the reason if the video was dropped or ended early."""
        problem = ""
        try:
            self._take(item, clips)
        except ClipError as error:
            if _is_gone(self.root):
                raise DataError(
                    f"{self.root} is empty or has disappeared, for example because its disk was removed; bring it back, and "
                    "run the same command again to continue"
                ) from None
            problem = f"{error} (after {self.clips} clips)" if self.clips else str(error)
            self._drop(item, problem)
        self.item, self.clips = self.item + 1, 0
        return problem

    def finish(self) -> None:
        self._encode()
        self.writer.finish(self.state(), dropped=self.dropped)

    def _take(self, item: Item, clips: Iterator[Clip]) -> None:
        for number, clip in enumerate(clips):
            if number < self.clips:
                continue  # it was stored or dropped before the interruption
            self.clips = number + 1
            if clip.problem:
                self._drop(item, clip.problem, clip.start)
                continue
            row = {"caption": item.caption, "video": item.name, "start": clip.start}
            tags = {"tags": dict(item.tags)} if item.tags else {}
            self.waiting.append((row | tags, clip, self.state()))
            # A batch ends when a shard is full, so a resumed pass forms the same batches as one that never stopped.
            if len(self.waiting) == min(self.encoder.batch, self.writer.room):
                self._encode()

    def _encode(self) -> None:
        waiting, self.waiting = self.waiting, []
        made = self.encoder([clip for _, clip, _ in waiting]) if waiting else {}
        for i, (row, _, state) in enumerate(waiting):
            self.writer.add(row, {name: tensor[i] for name, tensor in made.items()}, state)

    def _drop(self, item: Item, problem: str, start: int | None = None) -> None:
        self.dropped.append(vars(Dropped(self.item, item.name, problem, start)))

    def state(self) -> dict[str, Any]:
        return {"item": self.item, "clips": self.clips, "dropped": list(self.dropped)}
