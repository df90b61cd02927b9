"""Video files to latent shards, once, so that training does not decode and encode them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.peers import meet_peers
from fewstep.data.base import DataError
from fewstep.data.keep import Keep
from fewstep.data.layouts import Item, Layout
from fewstep.data.listing import Listing, root_of, write_listing
from fewstep.data.report import Dropped, Report, read_report, write_report
from fewstep.data.store import PartedWriter, Progress, ShardWriter, Storage, read_manifest
from fewstep.data.video import Clip, ClipError, Cut, read_clips, to_floats
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.bundle import fingerprint
from fewstep.models.images import ImageEncoder

LISTING = "listing.jsonl"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How videos become latents."""

    cut: Cut = Cut()
    keep: Keep = Keep()
    storage: Storage = "float16"
    shard_size: int = 64
    """Clips per file."""
    part_size: int = 64
    """Videos that one process takes at once."""

    def __post_init__(self) -> None:
        if self.part_size < 1:
            raise ValueError(f"part_size must be at least 1, got {self.part_size}")


@dataclass(frozen=True)
class Prepared:
    """What a preparation left in `folder`."""

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
    layout: Layout = "plain",
    root: str | Path = "",
    progress: Callable[[Progress], None] = lambda event: None,
    image: ImageEncoder | None = None,
) -> Prepared:
    """Decode, cut and encode the captioned videos of `source` (see `read_listing`) into shards in `output`.

    Under torchrun every process calls it, and each takes its share; the folder does not depend on how many there are.
    Killed and called again with the same arguments, by as many or others, it continues and leaves the same bytes; a
    finished folder is left as it is. What is dropped is reported with the reason (`Report`). `progress` is called once per
    video of this process' share. With the part `image` of a model that makes clips of images, what it makes of each clip's
    first frame (and last, if it needs that) is stored too. DataError if the folder was begun with other settings, videos or
    networks, or if no video gave a clip; NonFiniteError if a latent does not fit `plan.storage`.
    """
    cut, output, peers = plan.cut, Path(output), meet_peers()
    latent_shape = codec.latent_shape(cut.num_frames, cut.height, cut.width)
    with peers.in_turn():
        if peers.leads:
            _list(source, output, layout, root)
        listing = Listing(output / LISTING, root_of(source, root))
    settings = {
        "codec": fingerprint(codec), "cut": asdict(cut), "keep": asdict(plan.keep), "storage": plan.storage,
        "listing": _digest(output / LISTING), "part_size": plan.part_size, "shard_size": plan.shard_size,
    } | ({} if image is None else {"image": fingerprint(cast(nn.Module, image))})  # fmt: skip
    writer = PartedWriter(output, "latents", settings, -(-len(listing) // plan.part_size), peers)
    if not writer.complete:
        _Share(writer, listing, codec, image, plan, progress).run()
        peers.barrier()
        if peers.leads:
            write_report(output, listing, writer.manifests())
            writer.finish(latent_shape=list(latent_shape))
        peers.barrier()
    done = read_manifest(output, "latents")
    return Prepared(output, done["rows"], done["shards"], read_report(output))


def _list(source: str | Path, output: Path, layout: Layout, root: str | Path) -> None:
    """Write the list of the videos; refuse (DataError) one that is not the one this preparation was begun with."""
    file, fresh = output / LISTING, output / f"new-{LISTING}"
    write_listing(fresh, source, layout, root)
    if (output / "manifest.json").is_file() and (not file.is_file() or _digest(fresh) != _digest(file)):
        fresh.unlink()
        raise DataError(
            f"{source} lists other videos or captions than when {output} was begun (see {file}). "
            "Give another output folder, or delete this one."
        )
    fresh.replace(file)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


@dataclass(frozen=True)
class _Share:
    """What this process does: the parts that are its own and not there yet."""

    writer: PartedWriter
    listing: Listing
    codec: FrameAutoencoder
    image: ImageEncoder | None
    plan: Preparation
    progress: Callable[[Progress], None]

    def run(self) -> None:
        size, count = self.plan.part_size, len(self.listing)
        parts = {number: range(number * size, min((number + 1) * size, count)) for number in self.writer.mine}
        done, total = 0, sum(map(len, parts.values()))
        for number, items in parts.items():
            shards = self.writer.part(number, self.plan.shard_size)
            if not shards.complete:
                part = _Part(shards, items.start, self.codec, self.image, self.plan)
                while part.item < items.stop:
                    item = self.listing[part.item]
                    problem = part.video(item)
                    self.progress(Progress(done + part.item - items.start, total, item.name, problem))
                shards.finish(part.state(), dropped=part.dropped)
            done += len(items)


class _Part:
    """One pass over the videos of a part, from where the last whole shard ended."""

    def __init__(
        self,
        writer: ShardWriter,
        first: int,
        codec: FrameAutoencoder,
        image: ImageEncoder | None,
        plan: Preparation,
    ) -> None:
        self.writer, self.codec, self.image, self.plan = writer, codec, image, plan
        self.item: int = writer.resume.get("item", first)
        """The current video's number in the listing."""
        self.clips: int = writer.resume.get("clips", 0)
        """Clips of the current video that are done."""
        self.dropped: list[dict[str, Any]] = writer.resume.get("dropped", [])

    def video(self, item: Item) -> str:
        """Encode the clips of the current video; the reason if it was dropped, or broke off."""
        try:
            video = item.video()
            problem = self.plan.keep.of_video(video)
            if not problem:
                self._clips(item, video)
        except ClipError as error:
            problem = f"{error} (after {self.clips} clips)" if self.clips else str(error)
        if problem:
            self._drop(item, problem)
        self.item, self.clips = self.item + 1, 0
        return problem

    def _clips(self, item: Item, video: Path | BytesIO) -> None:
        for number, clip in enumerate(read_clips(video, self.plan.cut)):
            if number < self.clips:
                continue  # in a shard written before the interruption, or dropped before it
            self.clips = number + 1
            problem = clip.problem or self.plan.keep.of_clip(clip.frames)
            if problem:
                self._drop(item, problem, clip.start)
                continue
            row = {"caption": item.caption, "video": item.name, "start": clip.start}
            tags = {"tags": dict(item.tags)} if item.tags else {}
            self.writer.add(row | tags, self._encode(clip), self.state())

    def _drop(self, item: Item, problem: str, start: int | None = None) -> None:
        self.dropped.append(vars(Dropped(self.item, item.name, problem, start)))

    @torch.no_grad()
    def _encode(self, clip: Clip) -> dict[str, Tensor]:
        # One at a time: the latents of a clip then do not depend on which others were encoded with it.
        frames = to_floats(clip.frames)[None].to(next(self.codec.parameters()).device)
        made = {"latents": self.codec.encode(frames)}
        if self.image is not None:
            last = frames[:, :, -1] if self.image.needs_last else None
            made |= self.image.encode(frames[:, :, 0], self.codec, frames.shape[2], last)
        return {name: tensor[0].to(getattr(torch, self.plan.storage)) for name, tensor in made.items()}

    def state(self) -> dict[str, Any]:
        return {"item": self.item, "clips": self.clips, "dropped": list(self.dropped)}
