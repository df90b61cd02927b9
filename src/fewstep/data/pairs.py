"""ODE pairs: a teacher's states from noise to sample, stored at the times of a student's training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fewstep.core import Batch, Call, Pairs, Past, Rng, Seeds
from fewstep.core.build import digest, dump
from fewstep.core.call import Constants
from fewstep.core.disk import require_space, size_of
from fewstep.core.lock import holding
from fewstep.core.peers import meet_peers
from fewstep.core.stopping import saying
from fewstep.data.base import Data, DataError, Source, require
from fewstep.data.clipped import Clipped, past_of
from fewstep.data.images import PictureConditions, Pictured, require_pictures, require_stored
from fewstep.data.order import draw_indices
from fewstep.data.store import GOES_ON, PartedWriter, Progress, ShardReader, ShardWriter, Storage, read_manifest
from fewstep.data.texts import Texts
from fewstep.data.video import write_video
from fewstep.diffusion import CFG, Contract, Prediction, Sampler, Stream, TimeGrid
from fewstep.diffusion.times import check_grid
from fewstep.models.bundle import VideoModel
from fewstep.models.by_chunk import ByChunk
from fewstep.models.card import Card, latent_shape_of
from fewstep.models.denoiser import Predictor
from fewstep.models.images import image_names

PREVIEWED = 4
CLIP = "clip"
"""Name of the clip that a causal teacher read, beside the states of a pair."""
ALMOST = 0.999
"""Grids of diffusers' schedulers begin here or later, a little below pure noise. Their first state is the noise all the same."""


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """How a teacher is sampled to make pairs. None: the value in the teacher's card."""

    times: tuple[float, ...]
    """Times whose states are stored, decreasing from 1 to 0. Use the student's grid."""
    sampler: Sampler | None = None
    steps: int | None = None
    """Steps of the teacher; its grid has exactly this number of steps and contains `times`. None: from its card."""
    grid: TimeGrid | None = None
    guidance: CFG | None = None
    seed: int = 0
    """Seed of the first pair's noise; pair `i` uses seed `seed + i`, as in the model's own sampling."""
    per_prompt: int = 1
    """Pairs per prompt, each from its own noise."""
    num_frames: int | None = None
    storage: Storage = "float32"
    shard_size: int = 16
    """Pairs per file. A killed command loses at most one file per process."""
    part_size: int = 64
    """Number of pairs that a process takes at a time."""

    def __post_init__(self) -> None:
        check_grid(self.times)
        if self.sampler is not None:
            _require_ode(self.sampler)
        for name in ("per_prompt", "shard_size", "part_size", "steps", "num_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def resolve(self, contract: Contract) -> Course:
        """The sampler, times and guidance of this plan for a teacher with `contract`. A grid from `ALMOST` on begins at 1."""
        sampler = _require_ode(contract.sampler if self.sampler is None else self.sampler)
        steps = contract.steps if self.steps is None else self.steps
        base = contract.times(steps) if self.grid is None else self.grid.times(steps)
        if ALMOST <= base[0] < 1:
            base = (1.0, *base[1:])
        if (base[0], base[-1]) != (1.0, 0.0):
            raise ValueError(
                f"this model's own grid goes from t = {base[0]:g} to {base[-1]:g}, and pairs go from 1 to 0; "
                "name another grid in the plan, such as Shifted()"
            )
        guidance = contract.guidance if self.guidance is None else self.guidance
        return Course(sampler, grid_through(self.times, base), guidance)


def _require_ode(sampler: Sampler) -> Sampler:
    """ValueError if the sampler's states between noise and clip are not points of the teacher's ODE."""
    name = type(sampler).__name__
    if not sampler.deterministic:
        raise ValueError(
            f"{name} adds new noise and so has no ODE pairs; name another sampler in the plan, such as Euler()"
        )
    if not sampler.one_time:
        raise ValueError(
            f"{name} gives frames different times, and a pair has one time for the whole clip; name Euler() in the plan"
        )
    return sampler


@dataclass(frozen=True)
class Course:
    """What is run: the sampler, all times, and the guidance."""

    sampler: Sampler
    grid: tuple[float, ...]
    guidance: CFG

    @property
    def nfe(self) -> int:
        """Network evaluations per pair, guidance counted."""
        return self.sampler.calls(len(self.grid) - 1) * self.guidance.passes


@dataclass(frozen=True)
class PairsCost:
    """Cost of making pairs: network evaluations (of one clip each) and bytes on disk."""

    pairs: int
    nfe_per_pair: int
    bytes: int

    @property
    def nfe(self) -> int:
        return self.pairs * self.nfe_per_pair


@dataclass(frozen=True)
class PairsMade:
    """Result of `make_pairs`, in `folder`; `preview` is a GIF of the first endpoints."""

    folder: Path
    pairs: int
    preview: Path


def grid_through(times: tuple[float, ...], grid: tuple[float, ...]) -> tuple[float, ...]:
    """`grid` with its nearest interior points moved to `times`, so that the number of steps does not change.

    >>> grid_through((1.0, 0.7, 0.0), (1.0, 0.75, 0.5, 0.25, 0.0))
    (1.0, 0.7, 0.5, 0.25, 0.0)
    """
    wanted, free = check_grid(times)[1:-1], set(check_grid(grid)[1:-1])
    if len(wanted) > len(free):
        raise ValueError(f"a grid of {len(grid) - 1} steps cannot pass through {len(wanted)} times between 1 and 0")
    for time in sorted(wanted, key=lambda t: t not in free):  # times that are in the grid keep their point
        free.discard(min(free, key=lambda point: abs(point - time)))
    return check_grid((1.0, *sorted({*free, *wanted}, reverse=True), 0.0))


def pairs_cost(model: VideoModel, prompts: int, plan: PairPlan) -> PairsCost:
    """The cost of `make_pairs` for `prompts` prompts, computed before anything is run. A teacher that streams also reads a clip
    of the past once, which is stored."""
    count, course = prompts * plan.per_prompt, plan.resolve(model.card.contract)
    past = 1 if model.card.contract.stream is not None else 0
    values = (len(plan.times) + past) * torch.Size(model.latent_shape(plan.num_frames)).numel()
    size = values * getattr(torch, plan.storage).itemsize
    return PairsCost(count, course.nfe + past * course.guidance.passes, count * size)


def make_pairs(
    model: VideoModel,
    prompts: Sequence[str],
    output: str | Path,
    plan: PairPlan,
    *,
    batch: int = 8,
    progress: Callable[[Progress], None] = lambda event: None,
) -> PairsMade:
    """Sample the teacher on `prompts` and store its states at `plan.times` in `output`; `pairs_cost` gives the cost.

    Under torchrun every process calls it and takes its share; the result does not depend on the number of processes. An
    image-to-video teacher needs prompts with pictures (`Pictured`), whose conditions are stored too. A teacher that streams needs
    prompts with clips (`Clipped`), which are stored too: all its chunks are solved at once from noise, each after the clean
    chunks of the clip before it (Causal Forcing, 2602.02214). After a kill, the same call continues, also with another number of
    processes, and gives the same bytes (another `batch` may change last bits). A finished folder is returned unchanged.
    `progress` is called after every batch of this process' share. DataError if the folder was begun with another teacher, plan or
    prompts; NonFiniteError if a state is not finite in `plan.storage`; OSError if the disk is too small.
    """
    if not prompts or batch < 1:
        raise ValueError(f"make_pairs needs prompts and a batch size, got {len(prompts)} prompts and batch={batch}")
    require_pictures(prompts, model.card, "make_pairs")
    teacher, peers = _Teacher(model, plan, past_of(model.card, prompts)), meet_peers()
    count = len(prompts) * plan.per_prompt
    settings = {**teacher.facts(), "prompts": digest(list(prompts)), "count": count}
    if isinstance(prompts, Pictured):
        settings |= {"image": model.fingerprint("image"), "pictures": prompts.digest()}
    if isinstance(prompts, Clipped):
        settings |= {"clips": prompts.origin}
    with holding(Path(output)) if peers.leads else nullcontext(), saying(lambda: GOES_ON):
        writer = PartedWriter(output, "pairs", settings, -(-count // plan.part_size), peers)
        if not writer.complete:
            cost = pairs_cost(model, len(prompts), plan)
            held = sum(map(size_of, writer.folder.glob("part-*")))
            require_space(writer.folder, cost.bytes - held, f"{cost.pairs} pairs")
            parts = [range(n * plan.part_size, min((n + 1) * plan.part_size, count)) for n in writer.mine]
            done, total = 0, sum(map(len, parts))
            for number, pairs in zip(writer.mine, parts, strict=True):
                part = writer.part(number, plan.shard_size)
                for chunk in _chunks(len(part.rows), len(pairs), batch, plan.shard_size) if not part.complete else ():
                    last = _add(part, teacher, prompts, pairs[chunk.start : chunk.stop])
                    progress(Progress(done + chunk.stop, total, last))
                if not part.complete:
                    part.finish({})
                done += len(pairs)
            peers.barrier()
            if peers.leads:
                writer.finish(teacher_name=model.card.name, nfe_per_pair=pairs_cost(model, 1, plan).nfe_per_pair)
            peers.barrier()
        else:
            ShardReader(writer.folder, "pairs").check()
        with peers.in_turn():
            return PairsMade(writer.folder, count, _preview(model, writer.folder))


def _add(part: ShardWriter, teacher: _Teacher, prompts: Sequence[str], pairs: range) -> str:
    """Make the pairs of these numbers in one batch; return the prompt of the last one."""
    plan = teacher.plan
    rows, seeds = [i // plan.per_prompt for i in pairs], [plan.seed + i for i in pairs]
    chosen = [prompts[row] for row in rows]
    pictured = prompts if isinstance(prompts, Pictured) else None
    images = {} if pictured is None else PictureConditions(teacher.model, pictured, teacher.num_frames)(rows)
    clips = prompts.latents(rows).to(getattr(torch, plan.storage)) if isinstance(prompts, Clipped) else None
    read = {} if clips is None else {CLIP: clips}
    for i, states in enumerate(teacher.states(chosen, seeds, images, clips)):
        tensors = {"states": states, **{name: each[i] for name, each in (images | read).items()}}
        part.add({"caption": chosen[i], "seed": seeds[i]}, tensors, {})
    return chosen[-1]


class _Teacher:
    """A model that is sampled by a plan."""

    def __init__(self, model: VideoModel, plan: PairPlan, stream: Stream | None) -> None:
        self.model, self.plan, self.stream = model, plan, stream
        self.course = plan.resolve(model.card.contract)
        self.num_frames = plan.num_frames or model.card.num_frames
        self.shape = model.latent_shape(self.num_frames)
        self.texts = Texts(model, frozenset({"prompts"}))

    def facts(self) -> dict[str, Any]:
        """Everything that decides the states."""
        plan = self.plan
        causal: dict[str, Any] = {}
        if self.stream is not None:
            causal = {"stream": dump(self.stream), "chunks": self.stream.lengths(self.shape[1])}
        return causal | {
            "teacher": {name: self.model.fingerprint(name) for name in ("denoiser", "text")},
            "times": plan.times, **dump(self.course), "seed": plan.seed, "per_prompt": plan.per_prompt,
            "latent_shape": self.shape, "storage": plan.storage,
            "autocast": "bf16" if self.model.runtime.dtype == "bfloat16" else "off",
            "shard_size": plan.shard_size, "part_size": plan.part_size,
        }  # fmt: skip

    @torch.no_grad()
    def states(
        self, prompts: Sequence[str], seeds: Sequence[int], images: Mapping[str, Tensor], clips: Tensor | None
    ) -> Tensor:
        """`[B, T, C, F, H, W]`: `x_t` at each of the plan's times; the last one is the endpoint. `clips` are what the chunks of a
        teacher that streams read of the past."""
        device, course, network = str(self.model.device), self.course, cast("Predictor", self.model.denoiser)
        self.model.bring("text")
        cond, uncond = (each.with_extra(images).to(device) for each in self.texts(prompts, device))
        noise = Seeds(tuple(seeds), device)
        kept: list[Tensor] = []

        runner, calls, constants = self.model.runner(), self.model.runtime.guidance_calls, None
        if clips is not None and self.stream is not None:
            if clips.shape[1:] != self.shape:
                raise DataError(f"a clip of the past has shape {list(clips.shape[1:])}, and pairs {list(self.shape)}")
            network, constants = ByChunk(network, self.stream, clips.float().to(device)), Constants()

        def denoise(x_t: Tensor, t: Tensor, call: Call) -> Prediction:
            self.model.bring("denoiser")
            with self.model.runtime.denoising():
                call = replace(call, runner=runner, constants=constants)
                return course.guidance(network, x_t, t, cond, uncond, call, calls=calls)

        start = self.model.denoiser.path.prior(noise.randn((len(prompts), *self.shape), "start"))
        for step in course.sampler.sampling(denoise, start, course.grid, rng=noise):
            if course.grid[step.index] in self.plan.times:
                kept.append(step.prediction.x_t)
        return torch.stack([*kept, step.x], dim=1).to(getattr(torch, self.plan.storage))


def _chunks(start: int, stop: int, batch: int, shard_size: int) -> Iterator[range]:
    """Ranges of at most `batch` that do not cross a shard's edge, so that a resumed run forms the same batches."""
    while start < stop:
        end = min(stop, start + batch, (start // shard_size + 1) * shard_size)
        yield range(start, end)
        start = end


@torch.no_grad()
def _preview(model: VideoModel, folder: Path) -> Path:
    path = folder / "preview.gif"
    if not path.is_file():
        reader = ShardReader(folder, "pairs")
        ends = reader.read("states", range(min(PREVIEWED, len(reader))))[:, -1]
        write_video(path, model.decode(ends.to(model.device)), fps=model.card.fps)
    return path


@dataclass(frozen=True, kw_only=True)
class StoredPairs(Data):
    """A folder written by `fewstep pairs`. Its states belong to one teacher and are refused for another.

    Its `x0` are the endpoints: samples of the guided teacher, not recorded data. A discriminator that takes them as real (DMD2
    with an `adversary`) pulls the student towards the teacher's samples, with the teacher's faults. Of a teacher that streams
    they are the clips that its chunks read as their past, because its endpoints are chunks that follow those, and not each other.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "pairs", "x0"})

    path: str
    teacher: str = ""
    """Fingerprint of the denoiser that made the pairs, if it is not the model the run starts from (a causal student of a
    bidirectional teacher). Empty: the run's model."""
    text_cache: str = ""
    """Folder for the text states of all captions, as in Prompts. Empty: encode each caption when it is first drawn."""

    def check_card(self, card: Card) -> None:
        self._fit(latent_shape_of(card), card.name)
        if {"denoiser", "text"} <= {name for name, known in card.fingerprints.items() if known}:
            self._compare(card.fingerprints["denoiser"], card.fingerprints["text"], card.name)
        require_stored(
            read_manifest(self.path, "pairs")["settings"], card, card.fingerprints.get("image", ""), self.path
        )

    def check(self, model: VideoModel) -> None:
        self._fit(model.latent_shape() if "codec" in model.parts else None, model.card.name)
        self._compare(model.fingerprint("denoiser"), model.fingerprint("text"), model.card.name)
        image = model.fingerprint("image") if "image" in model.parts else ""
        require_stored(read_manifest(self.path, "pairs")["settings"], model.card, image, self.path)

    def _fit(self, here: tuple[int, ...] | None, name: str) -> None:
        there = tuple(read_manifest(self.path, "pairs")["settings"]["latent_shape"])
        if here is not None and here != there:
            raise DataError(
                f"{self.path} holds latents [C, F, h, w] = {list(there)}, but model {name!r} makes {list(here)}. "
                "Make the pairs again with this model, without --num-frames."
            )

    def _compare(self, denoiser: str, text: str, name: str) -> None:
        there = read_manifest(self.path, "pairs")["settings"]["teacher"]
        here = self.teacher or denoiser
        if there["denoiser"] != here:
            who = "the recipe's data.teacher" if self.teacher else f"the denoiser of {name!r}"
            raise DataError(
                f"{self.path} holds trajectories of denoiser {there['denoiser']}, but {who} is {here}. "
                "Make pairs with this model, or start from the model that made them. If they are meant to teach another "
                f"network, write in the recipe: data.teacher: {there['denoiser']}."
            )
        if there["text"] != text:
            raise DataError(
                f"{self.path} was made with text encoder {there['text']}, and model {name!r} has {text}, which encodes "
                "prompts differently. Make the pairs again with this model."
            )

    def open(self, model: VideoModel, needs: frozenset[str]) -> Source:
        require(self, needs)
        self.check(model)
        reader = ShardReader(self.path, "pairs")
        return _PairSource(reader, Texts(model, needs, self.text_cache, reader.captions), needs, image_names(model))


@dataclass(frozen=True)
class _PairSource:
    reader: ShardReader
    texts: Texts
    needs: frozenset[str]
    images: tuple[str, ...]
    """Names of the conditions made from images."""

    def batch(self, size: int, rng: Rng) -> Batch:
        indices, settings = draw_indices(len(self.reader), size, rng), self.reader.manifest["settings"]
        prompts = tuple(self.reader.row(i)["caption"] for i in indices)
        images = {name: self.reader.read(name, indices) for name in self.images}
        cond, uncond = (each.with_extra(images).to(rng.device) for each in self.texts(prompts, rng.device))
        c, f, h, w = settings["latent_shape"]
        batch = Batch(cond=cond, uncond=uncond, latent_shape=(c, f, h, w), prompts=prompts)
        if not self.needs & {"pairs", "x0"}:
            return batch
        states, past = self.reader.read("states", indices).to(rng.device), None
        if "chunks" in settings:
            past = Past(self.reader.read(CLIP, indices).to(rng.device), tuple(settings["chunks"]))
        return replace(
            batch,
            pairs=Pairs(states, tuple(settings["times"]), past) if "pairs" in self.needs else None,
            x0=(states[:, -1] if past is None else past.clips) if "x0" in self.needs else None,
        )
