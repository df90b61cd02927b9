"""A denoiser as its model runs it, for those who call it themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fewstep.attention import KVCache
from fewstep.compress.stepwise import knows_steps
from fewstep.core import Call, Cond, KVView
from fewstep.diffusion import NoisePath, Prediction
from fewstep.streaming.together import Asked, answered

if TYPE_CHECKING:
    from fewstep.models.bundle import VideoModel


@dataclass(frozen=True)
class Served:
    """The denoiser of a model: on its device, in eval mode, in the arithmetic of its `Runtime`."""

    model: VideoModel

    @property
    def path(self) -> NoisePath:
        return self.model.denoiser.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call = Call()) -> Prediction:
        return answered(Asked(self, x_t, t, cond, call))

    def alone(self, x_t: Tensor, t: Tensor, cond: Cond, call: Call) -> Prediction:
        """One call of the network."""
        kept = None if self.by_step or self.model.runtime.offload == "block" else call.constants
        call = replace(call, runner=self.model.runner(call.runner), constants=kept)
        with serving(self.model):
            prediction: Prediction = self.model.denoiser(x_t, t, cond, call)
        return prediction

    @cached_property
    def by_step(self) -> bool:
        """Whether blocks compute something else in each step, such as keys of the text."""
        return knows_steps(self.model.denoiser)

    @property
    def by_age(self) -> bool:
        """Whether the network looks up something by the number of a frame."""
        return self.model.denoiser.backbone.by_age

    def recall(self, memory: KVCache, x_t: Tensor, call: Call = Call()) -> KVView:
        return self.model.denoiser.recall(memory, x_t, call)


@contextmanager
def serving(model: VideoModel) -> Iterator[None]:
    """Calls of the model's denoiser: on its device, in eval mode, in the arithmetic of its `Runtime`."""
    model.bring("denoiser")
    with evaluating(model.denoiser), model.runtime.denoising():
        yield


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network as it is sampled, and afterwards as it was."""
    training = network.training
    if training:
        network.eval()
    try:
        yield
    finally:
        if training:
            network.train()
