"""A cache policy: which blocks run at which step, and what replaces the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fewstep.core.call import Runner


class CachePolicy(ABC):
    """A frozen dataclass. What is remembered is in the runner, of which every run of sampling has its own.

    So two runs, even one after the other step by step, never share what they remember, and a run that is given up leaves
    nothing behind on a network.
    """

    @abstractmethod
    def begin(self) -> Runner:
        """A runner for one run of sampling of one network; it remembers each branch and each route apart."""

    @abstractmethod
    def runs(self, step: int, steps: int, layers: int) -> tuple[int, ...]:
        """The blocks that are run at `step` of `steps` if every earlier step was made, of a network of so many `layers`."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether it changes nothing: every block is run at every step, bit for bit."""

    def share(self, steps: int, layers: int) -> float:
        """The share of all blocks that is run in one clip: what is saved is 1 less that."""
        return sum(len(self.runs(step, steps, layers)) for step in range(steps)) / (steps * layers)
