"""A transform: a frozen description of how a network differs from its class and arguments.

This room is below `models`, as `attention` is: a card names transforms as it names patterns and paths, so the reader of cards
must know them, and they must not know it. They see a network as `torch` does, with the attributes of a `Backbone` (`blocks`,
`width`, `scalars`). What runs networks to gather `statistics` is above.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor


class Transform(ABC):
    """One change. A network carries those that were made to it (`network.transforms`), and its card lists them in order."""

    trainable: ClassVar[bool] = True
    """Whether the weights of changed layers can still be trained; if not, only adapters over them can."""

    @property
    @abstractmethod
    def identity(self) -> bool:
        """Whether a network that was just changed computes what it computed before, bit for bit."""

    @abstractmethod
    def apply(self, network: Any) -> Any:
        """Change a backbone in place and return it. Weights that it has become those of the new structure; on the meta device
        the structure alone is made, into which weights can be loaded.

        ValueError where this network cannot be changed so.
        """

    def check(self, counts: Collection[int]) -> None:  # noqa: B027 - most transforms know no steps
        """Refuse (ValueError) a network that is sampled in these numbers of steps."""

    def fit(self, network: Any, statistics: Mapping[str, Tensor]) -> Self:
        """This transform with the numbers that it finds for `network`: `statistics` are by the name of a block or layer.
        Itself where it has none to find."""
        return self


def transformed(network: Any, transforms: Iterable[Transform]) -> Any:
    """A backbone with `transforms` applied in their order; it is changed in place."""
    for transform in transforms:
        done = network.transforms
        network = transform.apply(network)
        network.transforms = (*done, transform)
    return network
