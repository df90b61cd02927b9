"""Networks that wait on the CPU while they are not used."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fewstep.methods.base import Nets


class Shelf(Nets):
    """The networks of a run, of which only those that the current kind of update uses are on the device.

    Asking for a role brings it in. What a kind of update (the roles it trains) asks for is remembered, so that when it
    comes again the others make room first, and what serves several updates in a row stays where it is.
    """

    def __init__(self, roles: Mapping[str, nn.Module], device: str) -> None:
        super().__init__(roles)
        self._device = device
        self._used: dict[tuple[str, ...], set[str]] = {}
        self._kind: tuple[str, ...] = ()
        for network in roles.values():
            network.to("cpu")

    def __getitem__(self, role: str) -> nn.Module:
        network: nn.Module = super().__getitem__(role)
        self._used.setdefault(self._kind, set()).add(role)
        return network.to(self._device)

    def begin(self, roles: tuple[str, ...]) -> None:
        self._kind = roles
        if roles in self._used:
            for role, network in self.roles.items():
                if role not in self._used[roles]:
                    network.to("cpu")

    def bring(self, *roles: str) -> None:
        self._used.setdefault(roles, set()).update(roles)
        self.begin(roles)
        for role in roles:
            _ = self[role]
