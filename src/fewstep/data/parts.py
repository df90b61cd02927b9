"""Parts of the prompts, each for a student of its own: multi-student distillation (MSD, 2410.23274).

A `Partition` is a rule that gives each prompt exactly one part, so the parts cover all prompts and share none. Training data keep
one part of it (`Part`), and the same rule later chooses the student for a prompt (`fewstep.Students`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core import Cond
from fewstep.core.bounds import Natural, Size, require_bounds
from fewstep.data.base import DataError

Encode = Callable[[Sequence[str]], Cond]
"""Text states of a list of prompts, as a text encoder gives them: `model.text.encode`."""
ROUNDS = 50


@dataclass(frozen=True, kw_only=True)
class Partition(ABC):
    """A rule that gives each prompt exactly one of `of` parts."""

    of: Size
    """Number of parts."""

    @abstractmethod
    def part(self, prompt: str, encode: Encode | None = None) -> int:
        """The part of a prompt, from 0 to `of - 1`; `encode` is for rules that read text states. DataError for a prompt that the
        rule cannot read."""

    @property
    def content(self) -> str:
        """Digest of what the rule reads from a file, which a student's card keeps; empty for a rule without a file."""
        return ""


@dataclass(frozen=True, kw_only=True)
class ByCentroid(Partition):
    """The nearest of `of` centroids of text embeddings, which `centroids` finds and stores.

    Not from the paper, which does not give it: the embedding is the mean of the text encoder's states over a prompt's tokens.
    Parts have about the same size only as far as the prompts have clusters of that size.
    """

    path: str
    """File of the centroids, made with the text encoder that is used here."""

    def part(self, prompt: str, encode: Encode | None = None) -> int:
        if encode is None:
            raise DataError("ByCentroid reads text states, and there is no text encoder; give a model with one")
        found, its = _read(self.path), embedding(encode([prompt]))
        if found.shape != (self.of, len(its)):
            raise DataError(
                f"{self.path} has {len(found)} centroids of width {found.shape[1]}; wanted are {self.of} (of) of width "
                f"{len(its)}, the text encoder's; make the file with it (fewstep.data.centroids), or write that number"
            )
        return int((found - its).square().sum(1).argmin())

    @property
    def content(self) -> str:
        return sha256(_read(self.path).numpy().tobytes()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the prompts: what the data of one student keep."""

    by: Partition
    """How prompts are divided."""
    index: Natural
    """The part that is kept, counted from 0."""

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.index >= self.by.of:
            raise ValueError(f"index is {self.index}, and there are {self.by.of} parts, counted from 0")

    def rows(self, prompts: Iterable[str], encode: Encode) -> list[int]:
        """Places of the prompts that belong to it. DataError if there are none."""
        parts = [self.by.part(prompt, encode) for prompt in prompts]
        kept = [row for row, part in enumerate(parts) if part == self.index]
        if not kept:
            raise DataError(f"none of {len(parts)} prompts belongs to part {self.index} of {self.by.of}; give others")
        return kept


def partition_of(data: object) -> dict[str, str]:
    """What a student's card says of the file that its data were divided by: `partition`, its digest; nothing without one."""
    part = getattr(data, "part", None)
    return {"partition": part.by.content} if part is not None and part.by.content else {}


def embedding(cond: Cond) -> Tensor:
    """Mean of a prompt's text states over its tokens, float32 `[D]` on the CPU."""
    read = cond.mask[0][:, None].float()
    return ((cond.text[0].float() * read).sum(0) / read.sum().clamp_min(1)).cpu()


@torch.no_grad()
def centroids(prompts: Sequence[str], encode: Encode, of: int, file: str | Path, seed: int = 0) -> Tensor:
    """Find `of` centroids of the prompts' embeddings, `[of, D]`, and write them to `file` (safetensors).

    `encode` is the text encoder's, `model.text.encode`. k-means from points that are drawn far apart (k-means++). DataError for
    fewer different prompts than parts.

    >>> centroids(["a red ball", "a blue box"], model.text.encode, 2, "centroids.safetensors")  # doctest: +SKIP
    """
    points = torch.stack([embedding(encode([prompt])) for prompt in prompts]).double()
    if (different := len(points.unique(dim=0))) < of:
        raise DataError(f"there are {different} different prompts for {of} parts; give more prompts, or fewer parts")
    generator = torch.Generator().manual_seed(seed)
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    while len(chosen) < of:
        distance = torch.cdist(points, chosen).square().amin(1)
        chosen = torch.cat([chosen, points[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, chosen).argmin(1)
        moved = torch.stack([points[nearest == k].mean(0) if (nearest == k).any() else chosen[k] for k in range(of)])
        if torch.equal(moved, chosen):
            break
        chosen = moved
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file({"centroids": chosen.float().contiguous()}, file)
    _read.cache_clear()
    return chosen.float()


@lru_cache(maxsize=8)
def _read(path: str) -> Tensor:
    try:
        return load_file(path)["centroids"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with fewstep.data.centroids") from None


PARTITIONS = (ByCentroid,)
