"""Calls of a run's networks, overheard: whoever listens is told of a call before it is made; the answer is the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from fewstep.methods.base import Nets
from fewstep.models import Denoiser


class Listener(Protocol):
    def hear(self, role: str, x_t: Tensor, t: Tensor) -> None: ...


class Overheard(Nets):
    """The same networks, wherever they are; every call of a denoiser is told to the listeners first."""

    def __init__(self, nets: Nets, listeners: Iterable[Listener]) -> None:
        super().__init__(nets.roles)
        self._nets, self._listeners = nets, tuple(listeners)
        self._ears: dict[str, nn.Module] = {}

    def __getitem__(self, role: str) -> nn.Module:
        network = self._nets[role]  # which brings it in, if it waits elsewhere
        if role not in self._ears:
            self._ears[role] = self._ear(role, network) if isinstance(network, Denoiser) else network
        return self._ears[role]

    def begin(self, roles: tuple[str, ...]) -> None:
        self._nets.begin(roles)

    def _ear(self, role: str, network: Denoiser) -> Denoiser:
        """A second object with the very attributes of `network`: weights, hooks and shards are the same, now and later."""
        listeners = self._listeners

        class Ear(type(network)):  # type: ignore[misc]
            def forward(self, x_t: Tensor, t: Tensor, *args: Any, **options: Any) -> Any:
                for listener in listeners:
                    listener.hear(role, x_t, t)
                return super().forward(x_t, t, *args, **options)

            def jvp(self, x_t: Tensor, t: Tensor, *args: Any) -> Any:
                for listener in listeners:
                    listener.hear(role, x_t, t)
                return super().jvp(x_t, t, *args)

        twin = object.__new__(Ear)  # a sharded network's own __new__ would make another class
        twin.__dict__ = network.__dict__
        return cast(Denoiser, twin)
