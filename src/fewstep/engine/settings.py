"""Settings of a run: how it is executed. None of them changes what a method computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fewstep.compress import Transform
from fewstep.core.bounds import Amount, Bounds, Count, Decay, Natural, Positive, Size, require_bounds
from fewstep.models.lora import Lora


@dataclass(frozen=True, kw_only=True)
class Optim:
    """One role's optimiser and its learning-rate schedule."""

    type: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon"] = "adamw"
    """Optimiser. `muon` orthogonalises the momentum of the blocks' weight matrices; AdamW trains all other parameters. A
    network without such matrices refuses `muon`. `adamw8bit` keeps AdamW's moments in 8 bits; `paged_adamw8bit` also lets a
    GPU move them to main memory when its own is short. Both need `pip install "fewstep[eightbit]"` (bitsandbytes), and
    weights that are not divided over processes."""
    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    lr_of: dict[str, Positive] = field(default_factory=dict)
    """Learning rates for some parameters, by a part of their names: `{motion_modules: 2.0e-5}`. All others use `lr`."""
    only: tuple[str, ...] = ()
    """Parts of names: parameters that have one of them are trained, and no others, as in `[motion_modules]`. Empty: all are."""
    frozen: tuple[str, ...] = ()
    """Parts of names of parameters that stay as they are, as in `[conv, proj]`. They need no gradient and no moments."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Betas of AdamW. Muon's momentum is always 0.95."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay; 0: none."""
    warmup: Natural = 0
    """Iterations of linear warm-up, starting from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up. `cosine` and `linear` fall to 0 one iteration after the last one, so the last iteration
    still trains."""
    clip: Positive = 1.0
    """Largest norm of the role's whole gradient; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        require_bounds(self)

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return (not self.only or any(key in name for key in self.only)) and not any(key in name for key in self.frozen)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a run is spread over the processes that `torchrun` started, and where it trades time for memory.

    These settings change a run's numbers by rounding only. They are not part of a run's identity: a run may resume with
    other values. Processes = replicate x shard x sequence.
    """

    shard: Natural = 0
    """Processes that share each denoiser's weights, gradients and optimiser states (times `sequence`); with `settings.lora`
    they share the frozen blocks below the adapters. 0: all processes; with `settings.lora` every process has the frozen blocks
    whole, unless there is `replicate`."""
    replicate: Size = 1
    """Copies of each sharding group (HSDP): groups exchange gradients; weights stay within a group."""
    sequence: Size = 1
    """Neighbouring processes that share each clip, with a part of the tokens each (Ulysses). For clips too long for one
    device. Must divide the network's heads and its tokens."""
    checkpointing: bool = False
    """Recompute the denoisers' blocks in the backward pass instead of storing their activations: a third more computation,
    much less memory."""
    offload: bool = False
    """Keep on the CPU: networks that the current update does not use, the averaged student, optimiser states between steps,
    and, with `checkpointing`, what flows between the blocks. With `settings.lora` no network moves: the frozen blocks wait,
    and each comes when it runs."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings.parallel")

    @property
    def whole(self) -> bool:
        """Whether no setting asks for sharded networks. With adapters, every process then holds the frozen weights whole."""
        return self.shard * self.sequence == 1 or (self.shard, self.replicate) == (0, 1)


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health checks: at intervals, a verdict on the student from clips of fixed prompts and seeds, and what to do then.

    Only the last two fields can change what a run computes, and only after a bad verdict. There are no checks if the run is
    shorter than `every` or distils nothing.
    """

    every: Count = 25
    """Iterations between two checks; the last iteration is checked too. A check samples `prompts x seeds` clips per step
    count."""
    prompts: Size = 8
    """Number of prompts, drawn from the run's own data by its seed."""
    seeds: Annotated[int, Bounds(2, 1_024)] = 2
    """Clips per prompt; at least two, because diversity needs two."""
    keep_best: bool = True
    """Keep the best student so far, and return it if the run ends diverging or collapsing. A probe uses its own rule."""
    stop_on_collapse: bool = True
    """Stop the run after two `collapsing` checks in a row; such runs have never recovered."""
    help_critic: Natural = 2
    """Largest number of extra rounds of every update that does not train the student, while the critic lags; 0: none."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings.health")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length, batch, optimisers, precision and bookkeeping of a run."""

    steps: Count
    """Number of training iterations."""
    batch: Size = 16
    """Samples per gradient computation."""
    accumulate: Size = 1
    """Gradient computations per optimiser step, summed over all processes: each of N processes makes 1/N of them. One
    process with `accumulate: 8` and eight processes use the same samples and the same noise."""
    seed: int = 0
    optim: dict[str, Optim] = field(default_factory=dict)
    """Optimiser of each role, by name; a trained role without an entry uses the student's."""
    start: str | None = None
    """Folder of an earlier student, or `world`: the student starts from its denoiser. null: from a copy of the teacher's.
    Roles that are copies of the teacher are not affected."""
    transforms: tuple[Transform, ...] = ()
    """Transforms applied to the student alone, which starts from the teacher's weights (or those of `start`) in another
    structure. `model.transforms` change the teacher, too."""
    lora: Lora | None = None
    """Train LoRA adapters over one frozen copy of the teacher's weights; with `start`, the student's are over those of the
    earlier student. null: train whole networks."""
    ema: Decay = 0.0
    """Decay of the averaged student, which the run returns; 0: return the student itself. In iteration k the decay is at
    most `(1 + k) / (10 + k)`, so that the average forgets the initial weights quickly."""
    autocast: Literal["off", "bf16"] = "off"
    """Precision of the networks' arithmetic; off is float32. Master weights, optimiser states and losses stay float32."""
    frozen: Literal["float32", "bf16"] = "float32"
    """How the matrices of frozen denoisers are kept: the teacher's and, with lora, those below the adapters. bf16 needs
    `autocast: bf16`, which multiplies in bfloat16 anyway: the same numbers in half the memory. The exact weights that adapters
    are merged into wait on the CPU, divided among the processes where the frozen weights are."""
    compile: bool = False
    """Compile the blocks of every network with `torch.compile`: minutes of compilation, then faster iterations."""
    log_every: Count = 10
    """Iterations between two rows of figures; the last iteration is logged too. Each figure is the mean within its
    iteration."""
    preview_every: Natural = 0
    """Iterations between two pictures: student and teacher on fixed prompts and seeds, or clips and their reconstructions if
    the codec is trained. The last iteration has one too. 0: none."""
    save_every: Natural = 0
    """Iterations between two checkpoints to resume from; the last iteration has one too. 0: only at the end."""
    keep_last: Count = 2
    """Number of checkpoints kept; the best student so far is kept too."""
    health: Health | None = Health()
    """Health checks of the student during the run, and the reaction to a bad verdict. null: none."""
    device: str = "cpu"
    parallel: Parallel = Parallel()
    allow_fallback: bool = False
    """If a requested feature is not available, run without it and record this in the student's card, instead of refusing."""

    def __post_init__(self) -> None:
        require_bounds(self, "settings")

    def brings(self, world: int = 1) -> bool:
        """Whether frozen blocks come when they run (`models.depot`) in a run of `world` processes: those below adapters if
        processes share them or they wait on the CPU; narrow ones if networks are sharded."""
        if self.lora is not None:
            return not self.parallel.whole or self.parallel.offload
        return self.frozen == "bf16" and (world > 1 or not self.parallel.whole)

    def optim_of(self, role: str) -> Optim:
        return self.optim.get(role) or self.optim.get("student") or Optim()
