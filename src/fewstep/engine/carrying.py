"""What a run carries from one update to the next, place by place, and its component of a checkpoint."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from fewstep.core import Carried
from fewstep.engine.checkpoint import Checkpoint
from fewstep.engine.mesh import Processes

COMPONENT = "carried"


class Places(defaultdict[int, Carried]):
    """What is carried for each place of this process; of a place that has nothing yet, an empty `Carried`."""

    def __init__(self) -> None:
        super().__init__(Carried)

    @property
    def component(self) -> dict[str, dict[str, Tensor]]:
        """The component of a checkpoint, whose names begin with the place; none if nothing is carried."""
        found = {f"{place}/{name}": x for place, carried in self.items() for name, x in carried.tensors.items()}
        return {COMPONENT: found} if found else {}

    def restore(self, saved: Checkpoint, processes: Processes, accumulate: int) -> None:
        """Take up what a checkpoint holds for the places of this process, however many processes wrote it. With several
        processes, all must call."""
        places = processes.places(accumulate)
        for component in carried_in(saved):
            found = saved.part(component, lambda name: int(name.partition("/")[0]) in places, processes.disk)
            for place in places:
                start = f"{place}/"
                self[place] = Carried({n.removeprefix(start): x for n, x in found.items() if n.startswith(start)})


def carried_in(saved: Checkpoint) -> set[str]:
    """The component of what a run carried, if there is one: none if every stream had just ended."""
    return {COMPONENT} & {*saved.components}
