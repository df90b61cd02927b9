"""Networks that stay on the CPU while they are not used."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from fewstep.methods.base import Nets


class Shelf(Nets):
    """The networks of a run. Only those that the current kind of update uses are on the device.

    Asking for a role moves it to the device. The shelf remembers what each kind of update (the roles it trains) asks for. When
    that kind comes again, the other networks leave first, and a network that several updates in a row use stays. Networks whose
    blocks wait elsewhere already (`stay`) do not move.
    """

    def __init__(self, roles: Mapping[str, nn.Module], device: str, stay: Collection[str] = ()) -> None:
        super().__init__(roles)
        self._device = device
        self._used: dict[tuple[str, ...], set[str]] = {}
        self._kind: tuple[str, ...] = ()
        self._moving = {role: network for role, network in roles.items() if role not in stay}
        for network in self._moving.values():
            network.to("cpu")

    def __getitem__(self, role: str) -> nn.Module:
        network: nn.Module = super().__getitem__(role)
        self._used.setdefault(self._kind, set()).add(role)
        return network.to(self._device) if role in self._moving else network

    def begin(self, roles: tuple[str, ...]) -> None:
        self._kind = roles
        if roles in self._used:
            for role, network in self._moving.items():
                if role not in self._used[roles]:
                    network.to("cpu")

    def bring(self, *roles: str) -> None:
        self._used.setdefault(roles, set()).update(roles)
        self.begin(roles)
        for role in roles:
            _ = self[role]
