"""Video files to latent shards, once, so that training does not decode and encode them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.base import DataError
from fewstep.data.listing import Item, Listing, read_listing
from fewstep.data.store import Progress, ShardWriter, Storage
from fewstep.data.video import Clip, ClipError, Cut, read_clips, to_floats
from fewstep.models.autoencoder import FrameAutoencoder
from fewstep.models.bundle import fingerprint


@dataclass(frozen=True)
class Prepared:
    """What a preparation left in `folder`. `skipped` pairs a file with the reason."""

    folder: Path
    clips: int
    shards: int
    skipped: tuple[tuple[str, str], ...]


def prepare(
    source: str | Path,
    output: str | Path,
    codec: FrameAutoencoder,
    cut: Cut,
    *,
    storage: Storage = "float16",
    shard_size: int = 64,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Decode, cut and encode the captioned videos of `source` (see `read_listing`) into shards in `output`.

    Killed and called again with the same arguments it continues and leaves the same bytes; a finished folder is left
    as it is. A file that is absent, damaged or too short is skipped and recorded with the reason. `progress` is called
    once per video. DataError if the folder was begun with other settings, files or codec, or if no video gave a clip;
    NonFiniteError if a latent does not fit `storage`.
    """
    listing = read_listing(source)
    settings = {"codec": fingerprint(codec), "cut": asdict(cut), "storage": storage, "listing": listing.digest()}
    writer = ShardWriter(output, "latents", settings, shard_size)
    if not writer.complete:
        _Run(writer, codec, cut, getattr(torch, storage)).run(listing, progress or (lambda event: None))
    done = writer.manifest
    return Prepared(writer.folder, done["rows"], done["shards"], tuple((n, why) for n, why in done["skipped"]))


class _Run:
    """One pass over the listing, from where the last whole shard ended."""

    def __init__(self, writer: ShardWriter, codec: FrameAutoencoder, cut: Cut, dtype: torch.dtype) -> None:
        self.writer, self.codec, self.cut, self.dtype = writer, codec, cut, dtype
        self.item: int = writer.resume.get("item", 0)
        self.clips: int = writer.resume.get("clips", 0)
        """Clips of the current video that are done."""
        self.skipped: list[list[str]] = writer.resume.get("skipped", [])

    def run(self, listing: Listing, progress: Callable[[Progress], None]) -> None:
        items = listing.items
        shape = self.codec.latent_shape(self.cut.num_frames, self.cut.height, self.cut.width)
        while self.item < len(items):
            problem = self._video(items[self.item])
            if problem:
                self.skipped.append([items[self.item].name, problem])
            progress(Progress(self.item + 1, len(items), items[self.item].name, problem))
            self.item, self.clips = self.item + 1, 0
        skipped = [*map(list, listing.skipped), *self.skipped]
        if not self.writer.rows and not self.writer.pending:
            raise DataError("no video gave a clip: " + "; ".join(f"{name}: {why}" for name, why in skipped[:3]))
        self.writer.finish(self._state(), latent_shape=list(shape), skipped=skipped)

    def _video(self, item: Item) -> str:
        """Encode the clips of one video; the reason if it gave fewer than it should."""
        try:
            for number, clip in enumerate(read_clips(item.path, self.cut)):
                if number < self.clips:
                    continue  # in a shard written before the interruption
                self.clips = number + 1
                row = {"caption": item.caption, "video": item.name, "start": clip.start}
                self.writer.add(row, {"latents": self._encode(clip)}, self._state())
        except ClipError as error:
            return f"{error} (after {self.clips} clips)" if self.clips else str(error)
        return ""

    @torch.no_grad()
    def _encode(self, clip: Clip) -> Tensor:
        # One at a time: the latents of a clip then do not depend on which others were encoded with it.
        device = next(self.codec.parameters()).device
        return self.codec.encode(to_floats(clip.frames)[None].to(device))[0].to(self.dtype)

    def _state(self) -> dict[str, object]:
        return {"item": self.item, "clips": self.clips, "skipped": list(self.skipped)}
