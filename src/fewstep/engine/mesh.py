"""The processes of a run: their number, their shares, and the few messages between them.

`torchrun` starts them; nothing here launches anything. Ranks count fastest through `sequence`, then `shard`, then
`replicate`, so that the processes that talk most are neighbours.
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
    """The peers of a run, which also talk (over a backend for the CPU) and share networks. `Processes()` is a run of one."""

    sequence: int = 1
    """Neighbouring processes that share each clip, with a part of the tokens each."""
    weights: DeviceMesh | None = None
    """Mesh over which every network is sharded: `(shard,)` or `(replicate, shard)`. None with one process and with
    adapters: then every process has whole networks."""
    tokens: dist.ProcessGroup | None = None
    """Processes that share this process' clips; None if every process has its own clips."""
    disk: dist.ProcessGroup | None = None
    """A second group of all processes, used only for checkpoints: they are written during training and need their own
    communication."""

    def places(self, accumulate: int) -> range:
        """The places of random numbers and data whose micro-batches are computed here.

        All processes together have the places `0 ... accumulate - 1`, as one process has: so a step's samples and noise
        do not depend on how many there are.
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
        """What the leader passes, in every process."""
        if self.talk is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        chosen: T = box[0]
        return chosen


def join(settings: Settings) -> Processes:
    """Meet the other processes of this run, which `require_mesh` has found possible. A run of one meets nobody."""
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
    if settings.lora is None:
        shard = here.world_size // replicate  # shards of one network lie across the neighbours that share a clip, too
        shape = (shard,) if replicate == 1 else (replicate, shard)
        weights = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if sequence > 1:
        clips = init_device_mesh(device, (here.world_size // sequence, sequence), mesh_dim_names=("clips", "tokens"))
        tokens = clips["tokens"].get_group()
    talk, disk = (dist.new_group(backend="gloo") for _ in range(2))
    return Processes(here.rank, here.world_size, talk, sequence, weights, tokens, disk)


def require_mesh(parallel: Parallel, accumulate: int, device: str) -> None:
    """Refuse (ValueError) what the processes that there are cannot do."""
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
            f"settings.accumulate: {accumulate} micro-batches per step cannot be dealt to {places} processes evenly; "
            f"write accumulate: {-(-accumulate // places) * places} (their number in all processes together)"
        )
    if parallel.offload and torch.device(device).type == "cpu":
        raise ValueError("settings.parallel.offload moves idle networks to the CPU, and settings.device is cpu already")
