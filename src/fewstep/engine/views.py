"""The networks of a run as methods and checks see them: denoisers are called in the run's way, and listeners are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fewstep.attention import KVCache
from fewstep.core import Call, Cond, KVView
from fewstep.diffusion import Kind, NoisePath, Prediction
from fewstep.diffusion.prediction import Tangent
from fewstep.methods.base import Nets
from fewstep.models import Denoiser
from fewstep.models.spread import Spread


class Listener(Protocol):
    """Is told of each call before it is made; the call's result does not change."""

    def hear(self, role: str, x_t: Tensor, t: Tensor) -> None: ...


@dataclass(frozen=True)
class View:
    """A denoiser that can only be called (a `Predictor`)."""

    role: str
    network: Denoiser
    spread: Spread
    listeners: tuple[Listener, ...] = ()

    @property
    def path(self) -> NoisePath:
        return self.network.path

    @property
    def kind(self) -> Kind:
        return self.network.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        self._tell(x_t, t)
        prediction: Prediction = self.network(x_t, t, cond, self.spread(call))
        return prediction

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[int], call: Call = Call()) -> list[Tensor]:
        return self.network.features(x_t, t, cond, layers, self.spread(call))

    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Cond, dx: Tensor, dt: Tensor, call: Call = Call()
    ) -> tuple[Prediction, Tangent]:
        self._tell(x_t, t)
        return self.network.jvp(x_t, t, cond, dx, dt, self.spread(call))

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.network.recall(memory, x_t, self.spread(call))

    def _tell(self, x_t: Tensor, t: Tensor) -> None:
        for listener in self.listeners:
            listener.hear(self.role, x_t, t)


class Views(Nets):
    """The same networks, on whatever device they are; a denoiser is returned as a `View`."""

    def __init__(self, nets: Nets, spread: Spread = Spread(), listeners: Iterable[Listener] = ()) -> None:
        super().__init__(nets.roles)
        self._nets, self.spread, self._listeners = nets, spread, tuple(listeners)

    def __getitem__(self, role: str) -> Any:
        network = self._nets[role]  # this moves it to the device, if it is elsewhere
        return View(role, network, self.spread, self._listeners) if isinstance(network, Denoiser) else network

    def begin(self, roles: tuple[str, ...]) -> None:
        self._nets.begin(roles)

    def bring(self, *roles: str) -> None:
        self._nets.bring(*roles)
