"""How a run is executed: nothing in here changes what a method means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fewstep.core.bounds import Amount, Bounds, Count, Decay, Natural, Positive, Size, require_bounds
from fewstep.models.lora import Lora


@dataclass(frozen=True, kw_only=True)
class Optim:
    """One role's optimiser and its learning-rate schedule."""

    type: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the momentum of the blocks' matrices and leaves everything else to AdamW.
    A network without such matrices refuses it."""
    lr: Positive = 1e-4
    lr_of: dict[str, Positive] = field(default_factory=dict)
    """Another learning rate, by a part of the names of the parameters it is for: `{motion_modules: 2.0e-5}`."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW; Muon's momentum is 0.95."""
    weight_decay: Amount = 0.0
    warmup: Natural = 0
    """Iterations of linear warm-up from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """What follows warm-up. Cosine and linear fall towards 0 and would be there one iteration after the last, so that the
    last one still trains."""
    clip: Positive = 1.0
    """Largest norm of the role's whole gradient."""

    def __post_init__(self) -> None:
        require_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a run is spread over the processes that `torchrun` started, and where it trades time for memory.

    None of it changes a run's numbers beyond rounding, so none of it is part of what identifies a run: a run may go on
    with other values. Processes = replicate x shard x sequence.
    """

    shard: Natural = 0
    """Processes over which every denoiser's weights, gradients and optimiser states are cut (times `sequence`).
    0 = as many as there are; with `settings.lora`, 1."""
    replicate: Size = 1
    """Copies of that group (HSDP): gradients travel between groups, weights stay within."""
    sequence: Size = 1
    """Neighbouring processes that share every clip, each with its part of the tokens (Ulysses): for clips that are too
    long for one device. Must divide the heads of the network and its tokens."""
    checkpointing: bool = False
    """Keep only what flows between the denoisers' blocks, and compute the rest again in the backward pass: a third more
    computation for a small part of the memory."""
    offload: bool = False
    """Networks that the current update does not touch, the average, and optimiser states between steps wait on the CPU."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings.parallel")

    @property
    def whole(self) -> bool:
        """Whether every process may hold its networks in one piece: nothing asks for a cut. With adapters it does so."""
        return self.shard == 1 or (self.shard, self.replicate) == (0, 1)


@dataclass(frozen=True, kw_only=True)
class Health:
    """A verdict on the student every so often, from clips of fixed prompts and seeds; and what is done about a bad one.

    Only the last two fields can change what a run computes, and only where it is ill. Runs that are shorter than `every`,
    and those that distil nothing, are not examined.
    """

    every: Count = 25
    """Every so many iterations and at the end, a check. It samples `prompts x seeds` clips per step count."""
    prompts: Size = 8
    """Of the run's own data, fixed by its seed."""
    seeds: Annotated[int, Bounds(2, 1_024)] = 2
    """Clips per prompt; without two there is no diversity."""
    keep_best: bool = True
    """Keep the best student so far, and return it where the run ends diverging or collapsing. A probe has its own rule."""
    stop_on_collapse: bool = True
    """End the run after two checks in a row that say `collapsing`; more iterations have never mended that."""
    help_critic: Natural = 2
    """Most extra turns of every update that does not train the student, while the critic lags; 0 = never."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings.health")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length, batch, optimisers, precision and bookkeeping of a run."""

    steps: Count
    batch: Size = 16
    """Samples per gradient computation."""
    accumulate: Size = 1
    """Gradient computations per optimiser step, in all processes together: N processes make 1/N of them each. So one
    process with `accumulate: 8` and eight processes train on the same samples with the same noise."""
    seed: int = 0
    optim: dict[str, Optim] = field(default_factory=dict)
    """By role; a trained role without an entry takes the student's."""
    start: str | None = None
    """Folder of an earlier student, or `world`, whose denoiser the student goes on from. null: a copy of the teacher's. Every
    other role begins as without it."""
    lora: Lora | None = None
    """Train adapters over one frozen set of the teacher's weights, in place of whole copies of it. null: whole networks."""
    ema: Decay = 0.0
    """Decay of the averaged student, which is what a run returns; 0 returns the student itself. In iteration k it is
    `(1 + k) / (10 + k)` where that is smaller: an average must first forget the weights it started from."""
    autocast: Literal["off", "bf16"] = "off"
    """Arithmetic of the networks. Master weights, optimiser states and losses stay float32."""
    compile: bool = False
    """`torch.compile` the blocks of every network: minutes of compilation, then faster."""
    log_every: Count = 10
    """Every so many iterations and at the end, a row of figures; each is the mean within its iteration."""
    preview_every: Natural = 0
    """Every so many iterations and at the end, a picture of student beside teacher on fixed prompts and seeds. 0 = never."""
    save_every: Natural = 0
    """Every so many iterations and at the end, a checkpoint to resume from. 0 = only at the end."""
    keep_last: Count = 2
    """Checkpoints kept; the best student so far is kept besides."""
    health: Health | None = Health()
    """Checks of the student during the run, and what is done about a bad verdict. Null = none."""
    device: str = "cpu"
    parallel: Parallel = Parallel()
    allow_fallback: bool = False
    """Where something asked for cannot be had, run otherwise and record it in the student's card, instead of refusing."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings")

    def optim_of(self, role: str) -> Optim:
        return self.optim.get(role) or self.optim.get("student") or Optim()
