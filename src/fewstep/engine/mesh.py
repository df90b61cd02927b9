"""The processes of a run: how many there are, what each one does, and the few messages between them.

`torchrun` starts them; nothing here starts a process. Neighbouring ranks differ in `sequence` first, then in `shard`, then
in `replicate`, so that the processes that exchange most data are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fewstep.core.env import place
from fewstep.core.peers import Peers, meet
from fewstep.engine.settings import Parallel, Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Processes(Peers):
    """The processes of a run, which exchange messages (through a CPU backend) and share networks. `Processes()` is one."""

    sequence: int = 1
    """Number of neighbouring processes that share each clip; each has a part of the tokens."""
    weights: DeviceMesh | None = None
    """Mesh over which the weights of every denoiser are divided: `(shard,)` or `(replicate, shard)`; with adapters, those of the
    frozen blocks. None with one process, and with adapters unless `settings.parallel` asks for it: every process has whole
    networks."""
    tokens: dist.ProcessGroup | None = None
    """Group of the processes that share clips with this one; None if every process has its own clips."""
    disk: dist.ProcessGroup | None = None
    """A second group of all processes, used only for checkpoints: they are written during training and need their own
    communication."""

    def places(self, accumulate: int) -> range:
        """The places of this process: one micro-batch each, which names its data and its random numbers.

        All processes together have the places `0 ... accumulate - 1`, and a single process has the same ones. So the
        samples and the noise of a step do not depend on the number of processes.
        """
        own = accumulate * self.sequence // self.world
        first = self.rank // self.sequence * own
        return range(first, first + own)

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Mean of every figure over all processes."""
        if self.talk is None:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self.talk)
        return dict(zip(figures, (values / self.world).tolist(), strict=True))

    def from_leader(self, value: T) -> T:
        """The value that the leader passes, on every process."""
        if self.talk is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        chosen: T = box[0]
        return chosen


def join(settings: Settings) -> Processes:
    """Connect to the other processes of this run, after `require_mesh` has accepted their number. One process alone
    connects to none."""
    here = place()
    if here.world_size == 1:
        return Processes()
    device, parallel = torch.device(settings.device).type, settings.parallel
    if device != "cpu":
        torch.accelerator.set_device_index(here.local_rank)
    if not dist.is_initialized():
        meet()
    replicate, sequence = parallel.replicate, parallel.sequence
    weights = tokens = None
    if settings.lora is None or not parallel.whole:
        shard = here.world_size // replicate  # neighbours that share a clip hold different shards of a network, too
        shape = (shard,) if replicate == 1 else (replicate, shard)
        weights = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if sequence > 1:
        clips = init_device_mesh(device, (here.world_size // sequence, sequence), mesh_dim_names=("clips", "tokens"))
        tokens = clips["tokens"].get_group()
    talk, disk = (dist.new_group(backend="gloo") for _ in range(2))
    return Processes(here.rank, here.world_size, talk, sequence, weights, tokens, disk)


def require_mesh(parallel: Parallel, accumulate: int, device: str) -> None:
    """Refuse (ValueError) settings that do not fit the number of processes or their device."""
    world = place().world_size
    rest = parallel.replicate * parallel.sequence
    wanted = rest * max(parallel.shard, 1)
    if world % rest or (parallel.shard and wanted != world):
        sizes = f"replicate {parallel.replicate} x shard {parallel.shard or 'any'} x sequence {parallel.sequence}"
        multiple = "" if parallel.shard else "a multiple of "
        raise ValueError(
            f"settings.parallel: {sizes} needs {multiple}{wanted} processes, and this run has {world}; "
            f"start it with torchrun --nproc-per-node {wanted}, or change the sizes (shard: 0 takes all that are left)"
        )
    places = world // parallel.sequence
    if accumulate % places:
        raise ValueError(
            f"settings.accumulate: {accumulate} micro-batches per step cannot be divided evenly among {places} processes; "
            f"write accumulate: {-(-accumulate // places) * places} (their number in all processes together)"
        )
    if parallel.offload and torch.device(device).type == "cpu":
        raise ValueError(
            "settings.parallel.offload moves idle networks to the CPU, and settings.device is already cpu; "
            "write offload: false"
        )
