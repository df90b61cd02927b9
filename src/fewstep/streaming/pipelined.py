"""The steps of a stream, shared by processes (timestep-forcing pipeline; Live Avatar, 2512.04677).

    process i, for each chunk:   x = noise, or what process i - 1 sends
                                 x = x after step i, which reads the memory of step i              one call
                                 send x to process i + 1; of the last process it is the chunk
                                 memory = memory and the keys and values of this call

While process i makes step i of a chunk, process i - 1 makes its step of the next one. So the stream is as fast as its slowest
step, and the first chunk takes all of them. It is the stream that one process makes, bit for bit: step i of a chunk reads what
step i of earlier chunks has left (`Stream.commit` levels), and nothing else goes from process to process than latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.streaming.session import Session


@torch.no_grad()
def pipelined(session: Session, count: int, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """The next `count` chunks of a session, latents `[B, C, f, h, w]`, at the last process; at the others nothing is yielded.

    All processes of `group` (None: all there are), one for each step, call this with equal sessions, whose models have equal
    weights. Whoever iterates drives it: iterate to the end in every process. `session` stays where it is. ValueError for a
    stream that does not remember its steps, and for another number of processes; RuntimeError where another process has failed.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    session.require_hops(size)
    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(size))
    sent: tuple[dist.Work | None, Tensor | None] = None, None

    def receive(shape: tuple[int, ...]) -> Tensor:
        x = torch.empty(shape, device=session.model.device)
        dist.recv(x, ranks[rank - 1], group)
        return x

    for x in session.hops(rank, count, receive):
        if rank == size - 1:
            yield x
            continue
        if sent[0] is not None:
            sent[0].wait()  # the next process is one chunk behind at most
        sent = dist.isend(x.contiguous(), ranks[rank + 1], group), x
    if sent[0] is not None:
        sent[0].wait()
